"""`python -m trainables.evaluate`: a trial's folder, a model's folder, and examples replayed on another model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dashboards.evaluation_page import marked
from trainables.attacks.natural import NATURAL_ATTACKS
from trainables.config import Point, TinyConfig, TrialConfig
from trainables.errors import InputError
from trainables.evaluate import load_subject, main, parse, protocol_of, run, settled
from trainables.evaluation.protocols import named_protocol
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.models.loading import load
from trainables.models.siglip import Siglip
from trainables.prepare import prepare
from trainables.results import EvaluationManifest, Preprocessing
from trainables.training.finetune import finetune
from trainables.training.pretraining import train_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trial_run(tiny_trial: TrialConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial's folder as Ray Train leaves it: checkpoints below it."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_trial.model_copy(update={"point": Point(temperature=0.07, epsilon=2 / 255, attack_steps=1, words=1)})
    finetune(config, prepare(config), CPU, None, folder, lambda metrics, checkpoint: None)
    return folder


@pytest.fixture(scope="module")
def base(tiny_trial: TrialConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    prepare(tiny_trial).base.save(folder)
    return folder


def evaluated(out: Path, *flags: str) -> EvaluationManifest:
    run(parse([*flags, "--out", str(out)]))
    return EvaluationManifest.model_validate_json((out / "manifest.json").read_text())


def test_a_trial_measured_again_is_what_the_trial_measured(trial_run: Path, tmp_path: Path) -> None:
    manifest = evaluated(tmp_path, "--model", str(trial_run), "--data.eval-split", "val", "--examples", "3")
    result = json.loads(next(trial_run.glob("*/result.json")).read_text())
    measured = {name: manifest.metrics[name].model_dump() for name in result["metrics"]}
    assert measured == result["metrics"]
    clean, both = (manifest.metrics[f"{target}/tr_r5"].value for target in ("clean", "both"))
    assert manifest.metrics["both/tr_drop_r5"].value == pytest.approx(clean - both)
    assert both >= clean * (1 - manifest.metrics["both/tr_asr_r5"].value) - 1e-9
    assert manifest.metrics["clean/rsum"].value > manifest.metrics["both/rsum"].value
    assert manifest.correct == result["correct"]
    assert manifest.temperature == pytest.approx(0.07)
    assert load(str(next(trial_run.glob("*/model")))).own_temperature == pytest.approx(0.07)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert len(lines) == 1 + len(manifest.metrics)
    page = (tmp_path / "examples.html").read_text()
    assert page.count("<h3>image") == 3
    assert page.count("data:image/png;base64,") == 3 * (3 + 2 * 5)


def test_a_model_without_a_trial_needs_data_and_a_protocol_file(
    base: Path, tiny_trial: TrialConfig, tmp_path: Path
) -> None:
    protocol = {"attacks": ["both"], "image_steps": 1, "gallery_images": 10, "audit": True, "bootstrap_samples": 100}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(protocol))
    flags = ["--model", str(base), "--protocol", str(tmp_path / "mine.yaml"), "--max-tokens", "32"]
    flags += [
        "--data.image-pixels",
        "32",
        "--data.shapes.train-images",
        "64",
        "--data.shapes.val-images",
        "16",
        "--data.shapes.test-images",
        "16",
    ]
    flags += ["--cache-dir", str(tiny_trial.cache_dir), "--epsilon", "4/255"]
    manifest = evaluated(tmp_path / "out", *flags)
    assert manifest.protocol.epsilon == 4 / 255
    assert manifest.queries == {"tr": 10, "ir": 50}
    assert manifest.audit is not None
    assert "Gradient masking" in (tmp_path / "out" / "examples.html").read_text()
    assert manifest.temperature == load_subject(str(base)).temperature


def test_a_grid_of_strengths_and_folds(trial_run: Path, tmp_path: Path) -> None:
    flags = ["--model", str(trial_run), "--protocol", "grid", "--gallery-images", "12", "--fold-images", "6"]
    manifest = evaluated(tmp_path, *flags)
    table = {name: metric.value for name, metric in manifest.metrics.items() if name.endswith("/mr_r5")}
    grid = [value for name, value in table.items() if name.startswith("both-") and ".float" not in name]
    assert len(grid) == 4 * 3 - 1
    assert min([*grid, table["clean/mr_r5"]]) < table["expected/mr_r5"] < max([*grid, table["clean/mr_r5"]])
    assert manifest.further["clean/folds_tr_r5"] >= manifest.metrics["clean/tr_r5"].value, (
        "smaller galleries are easier"
    )
    with pytest.raises(InputError, match="fold_images"):
        evaluated(tmp_path, *flags[:-1], "5")


def test_nature_is_a_protocol_too(trial_run: Path, tmp_path: Path) -> None:
    protocol = {"attacks": [attack.model_dump() for attack in NATURAL_ATTACKS[::9]], "eight_bit": False}
    (tmp_path / "some.yaml").write_text(yaml.safe_dump(protocol))
    assert named_protocol("natural", {}).targets[1:] == [attack.name for attack in NATURAL_ATTACKS]
    manifest = evaluated(
        tmp_path, "--model", str(trial_run), "--protocol", str(tmp_path / "some.yaml"), "--gallery-images", "12"
    )
    assert all(f"{attack.name}/mmi" in manifest.metrics for attack in NATURAL_ATTACKS[::9])


def test_examples_made_on_one_model_are_replayed_on_another(trial_run: Path, base: Path, tmp_path: Path) -> None:
    flags = ["--model", str(trial_run), "--transfer-from", str(base)]
    moved = evaluated(tmp_path / "moved", *flags)
    assert not any(".float/" in name for name in moved.metrics)
    own = evaluated(tmp_path / "own", "--model", str(trial_run))
    assert moved.metrics["clean/mr_r5"] == own.metrics["clean/mr_r5"]
    assert moved.correct != own.correct
    again = evaluated(tmp_path / "again", *flags)
    assert again.metrics == moved.metrics
    itself = evaluated(tmp_path / "itself", "--model", str(trial_run), "--transfer-from", str(trial_run))
    for name, metric in itself.metrics.items():
        assert metric == own.metrics[name], "replayed on the model they were made on, they do the same"


def test_a_stopped_cache_goes_on_where_it_was(trial_run: Path, base: Path, tmp_path: Path) -> None:
    first = evaluated(tmp_path / "first", "--model", str(trial_run), "--transfer-from", str(base), "--seed", "5")
    cache = parse(["--model", str(trial_run)]).cache_dir
    newest = max(cache.glob("adversarial-*/captions.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = newest.read_text().splitlines(keepends=True)
    newest.write_text("".join(lines[:3]) + lines[3][:10])  # torn in the fourth line
    pixels = np.load(newest.with_name("pixels.npy"), mmap_mode="r+")
    pixels[3:] = 0
    second = evaluated(tmp_path / "second", "--model", str(trial_run), "--transfer-from", str(base), "--seed", "5")
    assert second.metrics == first.metrics


def test_a_model_at_chance_is_told(
    trial_run: Path, tiny_trial: TrialConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = prepare(tiny_trial).base
    torch.manual_seed(0)
    for parameter in untrained.parameters():
        parameter.data = torch.randn_like(parameter) / 10
    untrained.save(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--max-tokens", "32", "--data.image-pixels", "32"]
    flags += ["--data.shapes.train-images", "64", "--data.shapes.val-images", "16", "--data.shapes.test-images", "16"]
    flags += ["--cache-dir", str(tiny_trial.cache_dir), "--out", str(tmp_path / "out")]
    assert main(flags) == 1
    told = capsys.readouterr().out
    assert "warning: no better than chance before any attack: clean/mr_r10 is " in told
    assert "warning: the gallery has 16 images, protocol.gallery_images asks for 200" in told
    manifest = EvaluationManifest.model_validate_json((tmp_path / "out" / "manifest.json").read_text())
    assert [caveat.void for caveat in manifest.caveats] == [True, False]
    assert "Before you rely on this" in (tmp_path / "out" / "examples.html").read_text()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "{run}", "--protocol", "stronk"], "protocols are search, strong"),
        (["--model", "{run}", "--epsilon", "0.5/255"], "set eight_bit: false"),
        (["--model", "/nowhere/at/all"], "cannot be loaded"),
        ([], "model"),
    ],
)
def test_bad_input_is_told(trial_run: Path, tmp_path: Path, flags: list[str], told: str) -> None:
    given = [flag.format(run=trial_run) for flag in flags]
    with pytest.raises(InputError, match=told):
        run(parse([*given, "--out", str(tmp_path)]))


def test_changes_of_a_caption_are_marked_and_escaped() -> None:
    assert marked("a red <b> cat", "a blue <b> cat") == "a <del>red</del> <ins>blue</ins> &lt;b&gt; cat"


SMALL = [
    "--data.shapes.train-images",
    "64",
    "--data.shapes.val-images",
    "16",
    "--data.shapes.test-images",
    "16",
    "--gallery-images",
    "8",
]


def tiny_model(family: str, folder: Path) -> Path:
    """A model of 48 pixels and at most 40 tokens, with random weights."""
    kinds = {"clip": Clip, "siglip": Siglip, "albef": Albef, "blip": Blip}
    tokenizer = train_tokenizer(["a red circle above a blue square, on grey ground"])
    size = TinyConfig(width=32, layers=2, heads=2, patch_pixels=8, embedding=16)
    torch.manual_seed(0)
    kinds[family].tiny(size, 48, 40, tokenizer).save(folder / family)
    return folder / family


@pytest.mark.parametrize(
    ("family", "resize", "tokens", "rerank"),
    [
        ("clip", "crop", 40, None),
        ("siglip", "stretch", 40, None),
        ("albef", "stretch", 30, 256),
        ("blip", "stretch", 35, 256),
    ],
)
def test_what_is_not_given_is_the_familys(
    family: str,
    resize: str,
    tokens: int,
    rerank: int | None,
    tiny_trial: TrialConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model(family, tmp_path)
    protocol = {"attacks": ["image"], "image_steps": 1, "bootstrap_samples": 100}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(protocol))
    arguments = parse(["--model", str(model), "--cache-dir", str(tiny_trial.cache_dir), *SMALL])
    subject = load_subject(str(model))
    own = settled(arguments, subject.model)
    assert (own.data.image_pixels, own.data.resize, own.max_tokens) == (48, resize, tokens)
    assert protocol_of(own, subject).rerank == rerank
    flickr = own.model_copy(update={"data": own.data.model_copy(update={"captions": "dataset_flickr30k.json"})})
    assert protocol_of(flickr, subject).rerank == (rerank and 128)

    manifest = evaluated(
        tmp_path / "out",
        "--model",
        str(model),
        "--cache-dir",
        str(tiny_trial.cache_dir),
        *SMALL,
        "--protocol",
        str(tmp_path / "mine.yaml"),
    )
    expected = Preprocessing(image_pixels=48, resize=resize, max_tokens=tokens, caption_text="family")
    assert manifest.preprocessing == expected
    told = f"{family}: images 48 x 48 ({resize}); captions as {family}'s text, at most {tokens} tokens\n"
    assert told in capsys.readouterr().err
    assert manifest.protocol.rerank is None, "a file of a protocol says all"


def test_flags_come_over_the_familys(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    model = tiny_model("albef", tmp_path)
    flags = ["--data.image-pixels", "32", "--data.resize", "crop", "--max-tokens", "20", "--rerank", "0"]
    flags += ["--caption-text", "attack-literature"]
    arguments = parse(["--model", str(model), *SMALL, *flags])
    subject = load_subject(str(model), 32)
    own = settled(arguments, subject.model)
    assert own == arguments
    assert (own.data.image_pixels, own.data.resize, own.max_tokens) == (32, "crop", 20)
    assert protocol_of(own, subject).rerank is None
    assert protocol_of(own.model_copy(update={"rerank": 5}), subject).rerank == 5


def test_images_are_resized_as_the_model_s_file_says_unless_a_flag_does(tmp_path: Path) -> None:
    model = tiny_model("clip", tmp_path)
    said = {"size": {"height": 48, "width": 48}, "do_center_crop": False}
    (model / "preprocessor_config.json").write_text(json.dumps(said))
    for flags, resize in (([], "stretch"), (["--data.resize", "crop"], "crop")):
        arguments = parse(["--model", str(model), *SMALL, *flags])
        assert settled(arguments, load_subject(str(model)).model).data.resize == resize


def test_more_tokens_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    for family, positions in (("clip", 40), ("blip", 40)):
        model = load_subject(str(tiny_model(family, tmp_path))).model
        settled(parse(["--model", family, "--max-tokens", str(positions)]), model)
        with pytest.raises(InputError, match=f"max_tokens 41: this {family} reads 40 tokens at most"):
            settled(parse(["--model", family, "--max-tokens", "41"]), model)
