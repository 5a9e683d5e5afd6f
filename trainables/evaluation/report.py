"""What an evaluation found, as a table."""

from __future__ import annotations

import sys
from pathlib import Path

from trainables.config import CLEAN
from trainables.results import EvaluationManifest


def strongest(manifest: EvaluationManifest) -> str:
    """The attack that leaves least of the mean recall, clean where there is none."""
    k = manifest.protocol.recall_at[0]
    attacks = [attack.name for attack in manifest.protocol.attacks]
    return min(attacks, key=lambda name: manifest.metrics[f"{name}/mr_r{k}"].value, default=CLEAN)


def table(manifest: EvaluationManifest) -> list[list[str | float]]:
    """Rows `attack, metric, value, low, high` with a header."""
    rows: list[list[str | float]] = [["attack", "metric", "value", "low", "high"]]
    for name, metric in manifest.metrics.items():
        target, _, measure = name.partition("/")
        rows.append([target, measure, metric.value, metric.low, metric.high])
    return rows


def print_report(manifest: EvaluationManifest, out: Path) -> None:
    """For a person at a terminal.

    Args:
        manifest: what was measured.
        out: folder of its files.
    """
    from rich.console import Console
    from rich.table import Table

    title = f"{manifest.model}: recall in %, with {100 * manifest.protocol.confidence:g} % intervals"
    shown = Table(title=title, title_justify="left", box=None)
    names = [f"{direction}_r{k}" for direction in ("tr", "ir") for k in manifest.protocol.recall_at]
    for column in ("attack", *names):
        shown.add_column(column)
    for target in dict.fromkeys(name.partition("/")[0] for name in manifest.metrics):
        metrics = [manifest.metrics[f"{target}/{name}"] for name in names]
        shown.add_row(target, *(f"{100 * m.value:.1f} [{100 * m.low:.0f}, {100 * m.high:.0f}]" for m in metrics))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(shown)
    if manifest.further:
        console.print(", ".join(f"{name} {100 * value:.1f}" for name, value in manifest.further.items()))
    if manifest.audit is not None:
        console.print(f"gradient masking: {manifest.audit.finding}")
        for check in manifest.audit.checks:
            if not check.passed:
                evidence = ", ".join(f"{name} {value:.3f}" for name, value in check.evidence.items())
                console.print(f"  failed: {check.name} ({check.loss} loss): {evidence}")
    for caveat in manifest.caveats:
        console.print(f"warning: {caveat.text}", soft_wrap=True, markup=False)
    console.print(f"files: {out / 'manifest.json'}  {out / 'table.csv'}  {out / 'examples.html'}", soft_wrap=True)
