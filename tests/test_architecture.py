"""Data goes one way: no two files import each other, and what is below knows nothing of what is above."""

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("study", "trainables", "search_spaces", "dashboards")
ROOMS = ("clusters", "execution", "tracking", "costs", "ledger", "search", "front")
"""Of `study`, from the commands down to the ground; each may import from those behind it."""
GROUND = ("study.arguments", "study.config", "study.mistakes", "study.paths", "study.records")


@cache
def imports() -> Mapping[str, frozenset[str]]:
    """Modules that each module imports, wherever in the file it does so, for types too."""
    files = {file: module_name(file) for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    modules = set(files.values())
    found = {}
    for file, module in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = frozenset(names & modules - {module})
    return found


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def reachable(module: str, graph: Mapping[str, frozenset[str]]) -> set[str]:
    seen: set[str] = set()
    left = set(graph[module])
    while left:
        seen.add(found := left.pop())
        left |= graph[found] - seen
    return seen


def circles(graph: Mapping[str, frozenset[str]]) -> list[str]:
    return sorted(module for module in graph if module in reachable(module, graph))


def floor(module: str) -> int:
    if module in GROUND:
        return len(ROOMS) + 1
    room = module.split(".")[1]
    return ROOMS.index(room) + 1 if room in ROOMS else 0


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("b")}) == ["b", "c"]
    assert circles(imports()) == []


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("search_spaces", ("study", "dashboards")),
        ("trainables", ("study",)),
        ("dashboards", ("study.run",)),
        ("study.clusters.files", ("study.clusters.checks", "study.clusters.nodes", "study.clusters.submission")),
        ("study.clusters.nodes", ("study.clusters.checks", "study.clusters.files", "study.clusters.submission")),
    ],
)
def test_what_is_below_does_not_know_what_is_above(below: str, above: tuple[str, ...]) -> None:
    graph = imports()
    found = {
        (module, other)
        for module in graph
        if module.startswith(below)
        for other in reachable(module, graph)
        if other.startswith(above)
    }
    assert not found


def test_a_room_of_study_imports_from_lower_ones_only() -> None:
    up = {
        (module, other)
        for module, others in imports().items()
        if module.startswith("study.")
        for other in others
        if other.startswith("study.") and floor(other) < floor(module)
    }
    assert not up


def test_no_command_imports_another_commands_entry_point() -> None:
    commands = {module for module in imports() if 'if __name__ == "__main__":' in (ROOT / path_of(module)).read_text()}
    assert {"study.run", "study.status", "trainables.trial"} <= commands
    entry = {(module, "study.run") for module in imports() if "study.run" in imports()[module]}
    assert not entry


def path_of(module: str) -> Path:
    path = Path(*module.split("."))
    return path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")


def test_text_is_utf_8_whatever_the_locale() -> None:
    named = {
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for package in (*PACKAGES, "benchmarks")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text(node) and not any(key.arg == "encoding" for key in node.keywords)
    }
    assert not named


def opens_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    binary = any(isinstance(given, ast.Constant) and "b" in str(given.value) for given in call.args)
    text = name == "open" and owner not in ("Image", "os", "tarfile") and not binary
    return text or name in ("read_text", "write_text")
