from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import pictures
from study.config import StudyConfig
from tests.pages import needs_browser
from tests.study.helpers import complete, opened, run_next, study

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    config = study(tmp_path, trials=3)
    ledger = opened(config)
    for clean, both in ((0.8, 0.1), (0.7, 0.2), (0.6, 0.3), (0.5, 0.35), (0.4, 0.05)):
        run_next(ledger, config, complete(clean, both))
    return config


def flags(config: StudyConfig, out: Path) -> list[str]:
    return ["--name", config.name, "--studies-dir", str(config.studies_dir), "--out", str(out)]


def test_the_table_is_drawn_without_a_browser_and_needs_nothing_from_elsewhere(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        pictures.main(flags(config, tmp_path / "out"))
    assert stopped.value.code == 2
    assert "Chromium, which is not installed" in capsys.readouterr().err
    svg = (tmp_path / "out" / "table.svg").read_text()
    assert "@font-face" not in svg
    assert not re.search(r"""(src|href)\s*[=:]|url\(["']?http""", svg)
    for text in ("t00000", "Finetune", ".800", "steps", "words"):
        assert text in svg, text


@needs_browser
def test_pictures_of_a_study(config: StudyConfig, tmp_path: Path) -> None:
    assert pictures.main(flags(config, tmp_path / "out")) == 0
    with Image.open(tmp_path / "out" / "page.png") as picture:
        assert picture.size == pictures.WINDOW
        assert len(set(picture.convert("RGB").resize((200, 200)).getdata())) > 50, "something is drawn"


def test_pictures_of_a_study_without_a_trial_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = study(tmp_path)
    opened(config)
    with pytest.raises(SystemExit):
        pictures.main(flags(config, tmp_path / "out"))
    assert "has no complete trial yet" in capsys.readouterr().err


def test_the_readme_shows_them_and_they_are_small() -> None:
    shown = re.findall(r"!\[[^\]]{20,}\]\((dashboards/pictures/[\w.]+)\)", README.read_text())
    assert sorted(Path(path).name for path in shown) == ["page.png", "table.svg"]
    for path in shown:
        assert 5_000 < (README.parent / path).stat().st_size < 150_000
    assert "python -m benchmarks.pictures" in README.read_text()
