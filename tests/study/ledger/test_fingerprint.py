"""What breaks a study's resume: everything that changes a result, by its content, and nothing else."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from study.arguments import parse
from study.ledger.frozen import fingerprint
from trainables.identity import differences, file_digest, remembered, source_digest

NAMES = {
    "base": ("--trial.model.base",),
    "masked_lm": ("--trial.model.masked-lm",),
    "image_tower": ("--trial.model.image-tower",),
    "text_tower": ("--trial.model.image-tower", "--trial.model.text-tower"),
}


def folder_model(root: Path) -> Path:
    root.mkdir(parents=True)
    for name, text in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "words"}.items():
        (root / name).write_text(text)
    return root


def of(root: Path, field: str, studies: Path) -> dict[str, object]:
    flags = [part for flag in NAMES[field] for part in (flag, str(root))]
    return fingerprint(parse(["--studies-dir", str(studies), *flags]), "d", "c")


def in_place(path: Path) -> None:
    """Other bytes, of the same length and with the same time."""
    status, text = path.stat(), path.read_text()
    path.write_text(text[::-1] if text[::-1] != text else "x" * len(text))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("field", NAMES)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_was_replaced_in_place_is_noticed(tmp_path: Path, field: str, file: str) -> None:
    model = folder_model(tmp_path / "model")
    for path in model.iterdir():
        os.utime(path, (1, 1))
    before = of(model, field, tmp_path)
    assert of(Path(shutil.copytree(model, tmp_path / "moved")), field, tmp_path) == before, "wherever it lies"
    in_place(model / file)
    changed = differences(before, of(model, field, tmp_path))
    assert [line.split(":")[0] for line in changed][-1] == f"trial.model.{field}"


def test_digests_are_remembered_and_never_of_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainables.identity.SETTLED_NS", -1)
    draw, path, calls = random.Random(0), tmp_path / "file", []

    def counted(file: Path) -> str:
        calls.append(file)
        return file_digest(file)

    path.write_text("0")
    changes: list[Callable[[], object]] = [
        lambda: path.write_text(str(draw.randrange(10))),
        lambda: in_place(path),
        lambda: (other := tmp_path / "other", other.write_text(str(draw.randrange(10))), other.replace(path)),
        lambda: None,
    ]
    for _ in range(200):
        draw.choice(changes)()
        assert remembered(path, tmp_path, counted) == file_digest(path)
    before = len(calls)
    assert remembered(path, tmp_path, counted) == file_digest(path)
    assert len(calls) == before < 200


CODE = '''
"""What it is."""
from pydantic import Field

X = Field(3, description="of it")


def f(a: int) -> int:
    """Doc."""
    return a + 1  # why


class C:
    """Doc."""
'''
SAME = {
    "docstring": ('"""Doc."""\n    return', '"""Another."""\n    return'),
    "no docstring": ('    """Doc."""\n    return', "    return"),
    "comment": ("# why", "# because"),
    "layout": ("return a + 1", "return (\n        a + 1\n    )"),
    "description": ('description="of it"', 'description="of that"'),
    "module's docstring": ('"""What it is."""', ""),
}
OTHER = {"number": ("a + 1", "a + 2"), "default": ("Field(3", "Field(4"), "name": ("def f", "def g")}


@pytest.mark.parametrize("change", [*SAME, *OTHER])
def test_code_is_what_it_does(tmp_path: Path, change: str) -> None:
    old, new = {**SAME, **OTHER}[change]
    assert old in CODE
    path = tmp_path / "code.py"
    path.write_text(CODE)
    before = source_digest(path)
    path.write_text(CODE.replace(old, new))
    assert (source_digest(path) == before) == (change in SAME)


FREE = (
    ("--protocol.batch-images", "7"),
    ("--trial.training.compile", "off"),
    ("--trial.training.micro-batch", "8"),
    ("--trial.training.log-every-steps", "1"),
    ("--trial.training.gradient-checkpointing",),
    ("--trial.workers.count", "2"),
)


@pytest.mark.parametrize("flags", FREE, ids=lambda flags: flags[0])
def test_what_changes_no_result_counts_only_where_something_depends_on_it(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    def changed(*given: str) -> bool:
        marks = [fingerprint(parse(["--studies-dir", str(tmp_path), *given, *more]), "d", "c") for more in ((), flags)]
        return marks[0] != marks[1]

    assert not changed()
    cost = '[{"metric": "cost/device_seconds", "direction": "minimize", "low": 0, "high": 9}]'
    assert changed("--objectives", cost) == (not flags[0].startswith("--protocol"))
    if flags[0].startswith("--protocol"):
        assert changed("--protocol.attacks", '["torchattacks:APGD", "image", "both"]')
