"""Studies side by side: what is printed, what the page shows, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashboards.comparison_page import comparison_page
from study.compare import compare, main
from study.config import Budget, Objective, StudyConfig, TrialTemplate
from study.front.hypervolume import hypervolume_share
from study.ledger.frozen import fingerprint, freeze
from study.ledger.ledger import Ledger
from study.view import read_study
from tests.pages import data_of, layout_of, traces_of
from tests.study.helpers import complete, study
from trainables.config import DataConfig, ModelConfig, Protocol, TrainingConfig, TrialConfig

ATTACK = "<img src=x onerror=alert(1)>"


def ended(
    folder: Path, name: str, values: list[tuple[float, float]], data_digest: str = "d", **fields: Any
) -> StudyConfig:
    """A study whose trials measured so much; each held half an hour."""
    config = study(
        folder, recipes=(), budget=Budget(trials=len(values)), **{"name": name, "sampler": "random", **fields}
    )
    config.paths.root.mkdir(parents=True)
    mark = freeze(config, fingerprint(config, data_digest, "code"), accept_changes=False)
    ledger = Ledger(config, config.paths, mark)
    for clean, robust in values:
        ledger.finish(ledger.take(), complete(clean, robust, device_seconds=1800), TrialConfig())
    return config


def compared(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[str, str]:
    """What is printed, and the page."""
    assert main([*flags, "--studies-dir", str(folder)]) == 0
    return capsys.readouterr().out, (folder / "comparison.html").read_text()


def test_families_stand_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(tmp_path, "clip", [(0.9, 0.1), (0.5, 0.3), (0.4, 0.2)])
    trial = TrialTemplate(model=ModelConfig(family="albef"))
    ended(tmp_path, "albef", [(0.8, 0.4), (0.5, 0.2)], trial=trial, protocol=Protocol(rerank=16))
    out, page = compared(tmp_path, capsys, "clip", "albef")
    share = hypervolume_share(np.array([[0.1, 0.9], [0.5, 0.7]]))
    assert out.splitlines()[1].split() == ["clip", "3", "2", "1", f"{share:.3f}", "1.50"]
    assert out.splitlines()[2].split()[:4] == ["albef", "2", "1", "1"]
    traces = traces_of(page, "fronts-0")
    assert traces["clip"]["x"] == [0.9, 0.5]
    assert traces["clip"]["marker"]["line"]["width"] == [2, 0], "the second is behind ALBEF's"
    assert traces["albef"]["marker"]["line"]["width"] == [2]
    assert traces_of(page, "progress")["albef"]["x"] == [0.5, 1.0]
    assert re.findall(r'role="rowheader">(\w+)</th>.*?<span title="([\w-]+)">t00000</span>', page) == [
        ("clip", "clip-t00000-s0"),
        ("albef", "albef-t00000-s0"),
    ]
    assert "surfaces-0" not in page, "they are not seeds of one study"


def test_seeds_of_one_study_attain_surfaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fronts = [[(1.0, 0.2), (0.6, 0.8)], [(0.8, 0.5)], [(0.8, 0.4), (0.6, 0.9)]]
    for seed, values in enumerate(fronts):
        ended(tmp_path, f"seed{seed}", values, seed=seed)
    ended(tmp_path, "other", [(0.9, 0.9)], seed=3, trial=TrialTemplate(training=TrainingConfig(epochs=7)))
    out, page = compared(tmp_path, capsys, "seed0", "other", "seed1", "seed2")
    lines = traces_of(page, "surfaces-0")
    points = {level: list(zip(lines[level]["x"], lines[level]["y"], strict=True)) for level in lines}
    expected = {
        "best": [(0.6, 0.9), (0.8, 0.5), (1.0, 0.2)],
        "median": [(0.6, 0.8), (0.8, 0.4)],
        "worst": [(0.6, 0.5), (0.8, 0.2)],
    }
    for level, surface in expected.items():
        np.testing.assert_allclose(points[level], surface, err_msg=level)
        assert lines[level]["line"]["shape"] == "vh"
    shares = {level: hypervolume_share(1 - np.array(surface)) for level, surface in expected.items()}
    attained = ", ".join(f"{level} {share:.3f}" for level, share in shares.items())
    assert f"seeds of one study (seed0, seed1, seed2): hypervolume attained: {attained}" in out.splitlines()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_other_metrics_can_be_compared_by(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = Objective(metric="cost/device_seconds", direction="minimize", low=0, high=3600)
    ended(tmp_path, "one", [(0.9, 0.1), (0.5, 0.3)])
    ended(tmp_path, "two", [(0.8, 0.4)], objectives=(cost, Objective(metric="clean/mr_r1")))
    metrics = ("both/mr_r1", "clean/mr_r1", "cost/device_seconds")[:count]
    _, page = compared(tmp_path, capsys, "one", "two", "--metrics", *metrics)
    figures = re.findall(r'Plotly\.newPlot\(\s*"([\w-]+)"', page)
    assert figures == [*(f"fronts-{index}" for index in range(count * (count - 1) // 2)), "progress"]
    assert page.count("plotly.js v") == 1
    assert 'role="rowheader">two</th>' in page
    for head in (metrics[-1], "w", "τ", "ε", "steps", "words"):
        assert f'role="columnheader">{head.replace("/", "/<wbr>")}</th>' in page
        assert f'<td role="cell" data-head="{head}">' in page
    for index in range(len(figures) - 1):
        lines = [trace for trace in data_of(page, f"fronts-{index}") if trace["mode"] == "lines"]
        assert len(lines) == 2, "every study has the front of these two objectives"
        assert all(len(line["x"]) <= 2 for line in lines)
    assert "tickformat" not in layout_of(page, "progress")["yaxis"]


def test_what_cannot_be_compared_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*names: str) -> str:
        with pytest.raises(SystemExit) as error:
            main([*names, "--studies-dir", str(tmp_path)])
        assert error.value.code == 2
        return capsys.readouterr().err

    ended(tmp_path, "one", [(0.9, 0.1)])
    ended(tmp_path, "stronger", [(0.9, 0.1)], protocol=Protocol(epsilon=4 / 255))
    ended(tmp_path, "elsewhere", [(0.9, 0.1)], data_digest="e")
    ended(tmp_path, "larger", [(0.9, 0.1)], data_digest="e", data=DataConfig(image_pixels=96))
    ended(tmp_path, "empty", [])
    told = refused("one", "stronger", "elsewhere")
    assert "  one and stronger: protocol.epsilon: " in told
    assert "  one and elsewhere: data_digest: d -> e" in told
    assert main(["one", "larger", "--studies-dir", str(tmp_path)]) == 0
    assert "  empty: clean/mr_r1\n  empty: both/mr_r1" in refused("one", "empty")
    unknown = refused("one", "larger", "--metrics", "clean/tr_r1")
    assert "  larger: clean/tr_r1" in unknown
    assert "give --metrics of these: both/mr_r1, clean/mr_r1" in unknown
    assert "a cost has a range only as an objective" in refused("one", "larger", "--metrics", "cost/device_seconds")
    assert "one is one study" in refused("one", "one")
    assert "there is no study at" in refused("one", "none")


def test_foreign_strings_are_escaped(tmp_path: Path) -> None:
    views = []
    for name in ("one", "two"):
        view = read_study(ended(tmp_path, name, [(0.9, 0.1)]).paths)
        hostile = {"recipe": ATTACK, "params": {ATTACK: ATTACK}}
        view = replace(view, manifests=[manifest.model_copy(update=hostile) for manifest in view.manifests])
        views.append(view)
    page = comparison_page(compare(views, ()))
    assert "<img" not in page.split("</style>")[1].split("<script")[0] + page.rsplit("</script>")[-1]
    assert "<img" not in json.dumps(traces_of(page, "fronts-0"))
    assert page.count("&lt;img") > 4
