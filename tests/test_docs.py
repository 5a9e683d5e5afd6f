"""The pages below docs/ tell the truth, as far as that can be checked here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.commands import read_line

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
ELSEWHERE = ("gcloud", "kubectl", "helm", "docker", "sbatch", "squeue", "scancel", "tail", "ssh", "curl", "sudo")
"""Programs whose flags are not known here."""


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (DOCS / page).read_text(), flags=re.S | re.M)
    lines = [line.strip() for text in blocks for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in PAGES for line in commands(page)])
def test_every_command_is_understood(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bash and by the parsers that it meets."""
    subprocess.run(["bash", "-n", "-c", line], check=True)
    monkeypatch.chdir(tmp_path)
    if line.split()[0] not in ELSEWHERE:
        read_line(line.replace("BUCKET", "my-studies"))


def test_the_stack_is_given_what_it_asks_for() -> None:
    (create,) = [line for line in commands("aws.md") if "create-stack " in line]
    template = re.sub(r"!\w+", "", (DOCS / "aws-stack.yaml").read_text())
    asked = {name for name, field in yaml.safe_load(template)["Parameters"].items() if "Default" not in field}
    assert set(re.findall(r"ParameterKey=(\w+)", create)) == asked


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_spoken_of_are_there(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target
