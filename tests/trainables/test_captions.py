"""What models read of captions: as published, word by word, clean and attacked; and languages with other words."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from trainables.attacks.lexicon import WordTokens
from trainables.attacks.proposals import masked_lm_substitutes
from trainables.attacks.substitutes import STOP_WORDS
from trainables.captions import bare_text, caption_text, core, put, refuse_unspaced
from trainables.config import AttackConfig, DataConfig, ModelConfig, Point, TrialConfig
from trainables.data import DataError
from trainables.evaluation.robustness import evaluate
from trainables.models.tokenizers import without_end
from trainables.prepare import Workshop, prepare
from trainables.training.pretraining import train_tokenizer

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published_captions.json").read_text())
CAPTIONS: list[dict[str, Any]] = PUBLISHED["captions"]
RAW = [caption["raw"] for caption in CAPTIONS]
READERS = {"clip": 77, "albef": 30, "blip": 35, "attack-literature": 77}
"""By the text that is read, the longest of its tokens; the literature's is read by CLIP here."""


def text_of(reader: str, caption: str) -> str:
    if reader == "attack-literature":
        return caption_text("clip", reader)(caption)
    return caption_text(reader, "family")(caption)


def tokenizer_of(reader: str) -> PreTrainedTokenizerBase:
    if reader in ("clip", "attack-literature"):
        merges = [tuple(merge.split()) for merge in PUBLISHED["clip_merges"]]
        return CLIPTokenizer(vocab=PUBLISHED["clip_vocabulary"], merges=merges)
    bert = BertTokenizer(vocab=PUBLISHED["bert_vocabulary"])
    return without_end(bert) if reader == "albef" else bert


@pytest.mark.parametrize("reader", ["clip", "albef", "blip"])
def test_texts_are_as_published(reader: str) -> None:
    for caption in CAPTIONS:  # a tab inside ALBEF's and BLIP's is as good as a space, to their tokenizers
        assert text_of(reader, caption["raw"]) == " ".join(caption[reader]["text"].split())


def test_the_attack_literatures_text_is_albefs() -> None:
    for caption in CAPTIONS:
        published = " ".join(caption["attack-literature"]["text"].split())
        assert caption_text("albef", "attack-literature")(caption["raw"]) == published
        assert caption_text("blip", "attack-literature")(caption["raw"]) == published


def test_plain_captions_are_read_as_all_others() -> None:
    """ASCII has a way of its own through `bare_text`."""
    for text in ["".join(map(chr, range(128))), *(f"a{letter}b {letter}C" for letter in map(chr, range(128))), *RAW]:
        assert bare_text(f"{text} \u00e9") == f"{bare_text(text)} \u00e9".strip(), repr(text)


def test_siglips_text_is_canonical() -> None:
    """As open_clip 3.3.0 (`canonicalize`) makes it: what punctuation joined stays joined."""
    siglip = caption_text("siglip", "family")
    assert siglip(RAW[0]) == "a somewhat dirty olderlooking twodoor top and bottom refrigerator"
    assert siglip(RAW[6]) == "a dried black flower in a long tall black white vase a glass bowl"
    assert siglip(RAW[7]).endswith("naïve zürich see no parking 100")


@pytest.mark.parametrize("reader", READERS)
def test_token_ids_are_as_published(reader: str) -> None:
    texts = [text_of(reader, caption) for caption in RAW]
    tokenizer, longest = tokenizer_of(reader), READERS[reader]
    whole = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
    by_words = WordTokens(tokenizer)(texts, longest)
    for caption, one, other in zip(CAPTIONS, whole, by_words, strict=True):
        assert list(one) == list(other) == caption[reader]["ids"], caption["raw"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The captions above as a data set, five an image: three images to train on, and three like them to evaluate."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    for image in range(6):
        Image.fromarray(np.full((32, 32, 3), 40 * image, dtype=np.uint8)).save(root / "images" / f"{image}.png")
    images = [{"id": image, "file_name": f"{image}.png"} for image in range(6)]
    captions = [{"id": row, "image_id": row // 5, "caption": raw} for row, raw in enumerate([*RAW, *RAW])]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (root / "split.json").write_text(json.dumps({"train": [0, 1, 2], "test": [3, 4, 5]}))
    return DataConfig(root=root, image_pixels=32, eval_split="test")


def trial(tiny_trial: TrialConfig, data: DataConfig, **model: Any) -> TrialConfig:
    changed = tiny_trial.model.model_copy(update={"max_tokens": 64, **model})
    return tiny_trial.model_copy(update={"data": data, "model": changed})


@pytest.mark.parametrize("reader", READERS)
def test_what_is_trained_on_and_evaluated_is_the_published_text(
    tiny_trial: TrialConfig, data: DataConfig, reader: str
) -> None:
    model = {"caption_text": reader} if reader == "attack-literature" else {"family": reader}
    workshop = Workshop(trial(tiny_trial, data, **model), print)
    train, test = workshop.substitutes()
    assert train.texts() == test.texts() == [text_of(reader, caption) for caption in RAW]
    assert workshop.gallery().texts == test.texts()
    vocabulary = set(workshop.masked_lm()[1].get_vocab())
    assert ("," in vocabulary) == (reader in ("clip", "blip")), "made tokenizers know the punctuation that is read"


def test_an_attacked_caption_is_a_text_with_one_other_word(tiny_trial: TrialConfig, data: DataConfig) -> None:
    prepared = prepare(trial(tiny_trial, data))
    attacks = tuple(AttackConfig.model_validate(name) for name in ("text", "both", "sga", "characters"))
    noise = AttackConfig(name="marks", attack="caption-noise", options={"kind": "punctuation", "share": 1.0})
    protocol = tiny_trial.protocol.model_copy(update={"attacks": (*attacks, noise)})
    made: dict[str, list[str]] = {}
    evaluate(
        prepared.base,
        prepared.gallery,
        protocol,
        max_tokens=64,
        device=torch.device("cpu"),
        observe=lambda name, labels, attacked: made.update({name: attacked.captions}),
    )
    reads = prepared.gallery.caption_text
    for name in ("text", "both", "sga"):
        assert list(map(reads, made[name])) == made[name]
        pairs = [
            [pair for pair in zip(before.split(), after.split(), strict=True) if pair[0] != pair[1]]
            for before, after in zip(prepared.gallery.texts, made[name], strict=True)
        ]
        assert max(map(len, pairs)) == 1
        for ((old, new),) in filter(None, pairs):
            assert put("", old) == put("", new), "its punctuation stays"
            assert core_of(new).isalpha()
            assert core_of(old) not in STOP_WORDS
    assert list(map(reads, made["marks"])) == made["marks"] != prepared.gallery.texts


def test_noise_that_the_family_does_not_read_does_nothing(tiny_trial: TrialConfig, data: DataConfig) -> None:
    prepared = prepare(trial(tiny_trial, data, family="albef"))
    noise = AttackConfig(name="marks", attack="caption-noise", options={"kind": "punctuation", "share": 1.0})
    protocol = tiny_trial.protocol.model_copy(update={"attacks": (noise,), "eight_bit": False})
    made: list[str] = []
    evaluate(
        prepared.base,
        prepared.gallery,
        protocol,
        max_tokens=64,
        device=torch.device("cpu"),
        observe=lambda name, labels, attacked: made.extend(attacked.captions),
    )
    assert made == list(map(prepared.gallery.caption_text, prepared.gallery.texts))


def core_of(word: str) -> str:
    return word[core(word)]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ('"half-asleep",', "half-asleep"),
        ("dog's!", "dog's"),
        ("(café)", "café"),
        ("cafe\u0301...", "cafe\u0301"),
        ("नमस्ते।", "नमस्ते"),
        ("“سلام”", "سلام"),
        ("dog❤️", "dog"),
        ("❤️", ""),
        ("👨‍👩‍👧", ""),
        ("&", ""),
    ],
)
def test_the_word_in_what_is_written(word: str, expected: str) -> None:
    assert core_of(word) == expected
    assert put("cat", word).replace("cat", expected, 1) == word


def test_substitutes_stand_where_the_word_stood() -> None:
    """The language model reads words alone, so punctuation around them changes no proposal."""
    torch.manual_seed(0)
    words = ["dog", "cat", "red", "small", "asleep", "half", "runs"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "-", ",", "the", *words]
    tokenizer = BertTokenizer(vocab={entry: place for place, entry in enumerate(vocabulary)})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    masked_lm = BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)).eval()
    plain, written = (
        masked_lm_substitutes([text], masked_lm, tokenizer)
        for text in ("the small dog runs", '"the small, & dog" - runs.')
    )
    assert written.words_of(0) == ['"the', "small,", "&", 'dog"', "-", "runs."]
    the, small, dog, runs = plain.options_of(0)
    assert small
    assert dog
    assert the == []
    expected = [[], [f"{o}," for o in small], [], [f'{o}"' for o in dog], [], [f"{o}." for o in runs]]
    assert written.options_of(0) == expected
    (compound,) = masked_lm_substitutes(["half-asleep", "small dog"], masked_lm, tokenizer).options_of(0)
    assert compound
    assert not any("-" in option for option in compound), "what stands between spaces is one word"


UNSPACED = [
    "一只黑白相间的狗在草地上追着红色的飞盘。",
    "白い猫がソファーの上で眠っている。",
    "ผู้ชายขี่จักรยานบนถนนที่มีต้นไม้",
    "ຜູ້ຊາຍຂີ່ລົດຖີບຢູ່ຖະໜົນໃຫຍ່",
    "ជនម្នាក់កំពុងជិះកង់នៅលើផ្លូវ",
]
SPACED = [
    "一只 黑白 相间 的 狗 在 草地 上 追 着 红色 的 飞盘 。",
    "ショッピングセンター の 前 で 待つ 人",
    "한 남자가 거리에서 자전거를 타고 있다",
    "कुत्ता घास पर दौड़ रहा है",
    "رجل يركب دراجة في الشارع",
    'A sign that says "北京" 😀',
]


def test_captions_without_spaces_are_refused_together() -> None:
    refuse_unspaced(SPACED)
    with pytest.raises(DataError) as refused:
        refuse_unspaced([*SPACED, *UNSPACED])
    told = str(refused.value)
    assert told.startswith("5 of 11 captions have no spaces between their words")
    assert all(caption in told for caption in UNSPACED)
    assert not any(caption in told for caption in SPACED)


def test_only_what_changes_words_needs_spaces(tiny_trial: TrialConfig, data: DataConfig, tmp_path: Path) -> None:
    assert data.root is not None
    (tmp_path / "images").symlink_to(data.root / "images")
    (tmp_path / "split.json").write_text((data.root / "split.json").read_text())
    document = json.loads((data.root / "captions.json").read_text())
    for entry in document["annotations"]:
        entry["caption"] = UNSPACED[0]
    (tmp_path / "captions.json").write_text(json.dumps(document))
    config = trial(tiny_trial, data.model_copy(update={"root": tmp_path}))
    image = tuple(AttackConfig.model_validate(name) for name in ("image", "torchattacks:PGD"))
    by_image = config.model_copy(update={"protocol": config.protocol.model_copy(update={"attacks": image})})
    train, _ = Workshop(by_image, print).substitutes()
    assert train.texts() == [UNSPACED[0]] * 15
    trained = by_image.model_copy(update={"point": Point(words=1)})
    for changing in (config, trained):
        with pytest.raises(DataError, match="have no spaces between their words"):
            Workshop(changing, print).substitutes()


def test_marks_stay() -> None:
    """Without its vowel signs or accents a word is another one; how they are encoded does not matter."""
    captions = ["कुत्ता घास पर दौड़ रहा है", "un café à la gare", "หมา วิ่ง", "Việt Nam"]
    assert [bare_text(caption) for caption in captions] == [caption.lower() for caption in captions]
    assert bare_text("un café ❤️ rouge!") == "un café rouge"
    tokenizer = train_tokenizer([bare_text(caption) for caption in captions])
    for caption in captions:
        ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(caption.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer(unicodedata.normalize("NFD", caption), add_special_tokens=False)["input_ids"] == ids
        bare = "".join(c for c in unicodedata.normalize("NFD", caption) if unicodedata.category(c)[0] != "M")
        assert tokenizer(bare, add_special_tokens=False)["input_ids"] != ids


def test_families_and_forms_have_their_own_substitutes(
    tiny_trial: TrialConfig, data: DataConfig, tmp_path: Path
) -> None:
    """Also where they share the masked language model."""
    cache = tmp_path / "cache"
    named = tiny_trial.model_copy(update={"cache_dir": cache})
    Workshop(trial(named, data), print).masked_lm()
    (masked_lm,) = cache.glob("masked-lm-????????????????")
    texts = {
        (family, form): Workshop(
            trial(named, data, family=family, caption_text=form, masked_lm=str(masked_lm)), print
        ).substitutes()[1]
        for family in ("clip", "blip")
        for form in ("family", "attack-literature")
    }
    assert texts["clip", "family"].texts() != texts["clip", "attack-literature"].texts()
    assert texts["clip", "family"].texts() != texts["blip", "family"].texts()
    assert ModelConfig().caption_text == "family"
