"""No image that a study's search looks at is one that its certification measures, on real sets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from study import certify
from study.arguments import parse
from study.ledger.trials import trial_template
from study.paths import StudyPaths
from trainables.data import Split, load_dataset
from trainables.results import TrialResult

RESULT = TrialResult(
    metrics={},
    correct={},
    queries={},
    device_seconds=0,
    seconds={},
    steps=1,
    resumed_from_steps=[],
    temperature=0.1,
    hashes={},
    versions={},
)


def looks(split: Split) -> set[bytes]:
    """What its images show; those that are plain are left out."""
    return {pixels.tobytes() for pixels in split.pixels if np.ptp(pixels)}


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--preset", "quickstart"], (2000, 100, 100)),
        (["--preset", "real_small", "--data.root", "coco_small", "--data.image-pixels", "24"], (1061, 154, 296)),
    ],
)
def test_search_and_certification_share_no_image(
    tmp_path: Path, real_data: Path, flags: list[str], sizes: tuple[int, ...]
) -> None:
    given = [str(real_data / flag) if flag == "coco_small" else flag for flag in flags]
    config = parse(["--name", "s", "--studies-dir", str(tmp_path), "--cache-dir", str(tmp_path / "cache"), *given])
    trial = trial_template(config).model_copy(update={"key": "s-t00000-s0"})
    folder = tmp_path / "s" / "runs" / trial.key / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(trial.model_dump_json())
    (folder / "result.json").write_text(RESULT.model_dump_json())

    searched = load_dataset(trial.data, trial.cache_dir)
    view: Any = SimpleNamespace(paths=StudyPaths(tmp_path / "s"))
    terms = certify.terms_of({"protocol": "strong", "seed": None, "gallery_images": None, "split": "test"}, 0)
    manifest: Any = SimpleNamespace(key=trial.key)
    arguments = certify._arguments(view, manifest, terms)
    certified = load_dataset(arguments.data, trial.cache_dir)

    found = (searched.train, searched.evaluation, certified.evaluation)
    assert tuple(len(split.image_ids) for split in found) == sizes
    assert certified.train.digest == searched.train.digest, "the model was trained on the same"
    seen = {*searched.train.image_ids.tolist(), *searched.evaluation.image_ids.tolist()}
    assert seen.isdisjoint(certified.evaluation.image_ids.tolist())
    assert (looks(searched.train) | looks(searched.evaluation)).isdisjoint(looks(certified.evaluation))
