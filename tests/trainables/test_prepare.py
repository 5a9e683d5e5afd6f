"""What trials share is made once, and can be named by others."""

from __future__ import annotations

import copy
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tokenizer_kinds import characters, wrapped
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import BertConfig, BertForMaskedLM

from trainables import prepare
from trainables.attacks.proposals import Proposer
from trainables.attacks.substitutes import Substitutes
from trainables.config import DataConfig, ModelConfig, PretrainConfig, ShapesConfig, TrialConfig
from trainables.errors import InputError
from trainables.prepare import Workshop

DATA = DataConfig(image_pixels=32, shapes=ShapesConfig(train_images=8, val_images=8, test_images=8))
PRETRAIN = PretrainConfig(mlm_epochs=1)


def workshop(cache: Path, masked_lm: Path | None) -> Workshop:
    model = ModelConfig(masked_lm=None if masked_lm is None else str(masked_lm), pretrain=PRETRAIN)
    return Workshop(TrialConfig(data=DATA, model=model, cache_dir=cache), print)


def test_a_masked_language_model_that_was_made_here_can_be_named(tmp_path: Path) -> None:
    made, tokenizer = workshop(tmp_path, None).masked_lm()
    (folder,) = tmp_path.glob("masked-lm-????????????????")
    named, beside = workshop(tmp_path, folder).masked_lm()
    assert (named.get_output_embeddings().bias == made.get_output_embeddings().bias).all()
    assert beside.get_vocab() == tokenizer.get_vocab()


def test_a_masked_language_model_needs_its_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=20, **sizes)).save_pretrained(folder)
    with pytest.raises(InputError, match="its vocabulary was not found"):
        workshop(tmp_path, folder).masked_lm()


def test_what_is_named_is_known_by_its_content(tmp_path: Path) -> None:
    workshop(tmp_path, None).masked_lm()
    (made,) = tmp_path.glob("masked-lm-????????????????")
    base = workshop(tmp_path, None)
    base.base()
    (clip,) = tmp_path.glob("base-????????????????")
    named, moved = tmp_path / "named", tmp_path / "moved"
    for folder in (named, moved):
        shutil.copytree(made, folder / "masked-lm")
        shutil.copytree(clip, folder / "clip")

    def hashes(folder: Path) -> dict[str, str]:
        model = ModelConfig(masked_lm=str(folder / "masked-lm"), base=str(folder / "clip"), pretrain=PRETRAIN)
        return Workshop(TrialConfig(data=DATA, model=model, cache_dir=tmp_path), print).hashes

    before = hashes(named)
    assert hashes(moved) == before, "where it lies does not matter"
    for name, changed in (("base", named / "clip" / "model.safetensors"), ("base", named / "clip" / "tokenizer.json")):
        content = changed.read_bytes()
        changed.write_bytes(content[:-1] + b" ")
        assert {key for key, value in hashes(named).items() if value != before[key]} == {name}
        changed.write_bytes(content)
    weights = named / "masked-lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert {key for key, value in hashes(named).items() if value != before[key]} == {"substitutes"}


def equal(one: Substitutes, other: Substitutes) -> bool:
    return all(np.array_equal(value, getattr(other, name)) for name, value in vars(one).items() if name[0] != "_")


def test_damaged_substitutes_are_made_again(tmp_path: Path) -> None:
    made = [copy.deepcopy(table) for table in workshop(tmp_path, None).substitutes()]
    for path in tmp_path.glob("substitutes-*/options.npy"):
        path.write_bytes(path.read_bytes()[:-200])
    assert all(map(equal, workshop(tmp_path, None).substitutes(), made))
    for path in tmp_path.glob("substitutes-*/words.npy"):
        path.unlink()
    assert all(map(equal, workshop(tmp_path, None).substitutes(), made))


def test_substitutes_are_made_by_all_at_once_and_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = workshop(tmp_path / "whole", None).substitutes()
    propose, all_three = Proposer.propose, threading.Barrier(3)
    made: list[int] = []

    def together(self: Proposer, texts: list[str], silent: bool) -> Substitutes:
        made.append(threading.get_ident())
        if made.count(threading.get_ident()) == 1:
            all_three.wait(60)  # each holds a shard
        return propose(self, texts, silent)

    monkeypatch.setattr(prepare, "SHARD", 5)
    monkeypatch.setattr(Proposer, "propose", together)
    shared = workshop(tmp_path / "shared", None)
    masked_lm = shared.masked_lm()
    monkeypatch.setattr(Workshop, "masked_lm", lambda _: copy.deepcopy(masked_lm))  # threads cannot load at once
    with ThreadPoolExecutor(3) as pool:
        tables = list(pool.map(lambda _: workshop(tmp_path / "shared", None)._substitutes("train"), range(3)))
    assert len(made) == math.ceil(len(shared.dataset.train.captions) / 5)
    assert all(equal(table, whole) for table in tables)
    assert not list(tmp_path.glob("shared/substitutes-*.shards"))


def test_who_is_stopped_loses_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    propose, left = Proposer.propose, 3

    def until_stopped(self: Proposer, texts: list[str], silent: bool) -> Substitutes:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return propose(self, texts, silent)

    monkeypatch.setattr(prepare, "SHARD", 10)
    monkeypatch.setattr(Proposer, "propose", until_stopped)
    with pytest.raises(KeyboardInterrupt):
        workshop(tmp_path, None)._substitutes("train")
    left = 3
    assert len(workshop(tmp_path, None)._substitutes("train").starts) == 41
    assert left == 1, "of four shards, two were there"


def test_a_masked_language_model_of_characters_is_refused_where_words_are_changed(tmp_path: Path) -> None:
    tokenizer = wrapped(characters())
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), pad_token_id=1, **sizes)).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(InputError, match="proposes no word for any of"):
        workshop(tmp_path, tmp_path / "lm").substitutes()


def test_nodes_with_caches_of_their_own_make_the_same(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    one = prepare.prepare(tiny_trial.model_copy(update={"cache_dir": tmp_path / "one"}))
    # Beside another worker, whose node has everything: it does not take part, and `transformers` saves on rank 0 alone.
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        other = prepare.prepare(tiny_trial.model_copy(update={"cache_dir": tmp_path / "other"}))
        assert dist.get_world_size() == 2
    finally:
        dist.destroy_process_group()
    assert one.hashes == other.hashes
    weights = (prepared.base.state_dict() for prepared in (one, other))
    assert all(torch.equal(a, b) for a, b in zip(*(states.values() for states in weights), strict=True))
    assert np.array_equal(one.caption_groups, other.caption_groups)
    made = [{path.name for path in (tmp_path / name).glob("[!c]*")} for name in ("one", "other")]  # not notes on files
    assert made[0] == made[1]
