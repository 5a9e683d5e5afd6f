"""YAML by its present standard, 1.2: `1e-1` is a number, `no` is a word, `1:30` is no sum, and a key stands once.

PyYAML goes by 1.1 and keeps the last of two equal keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

SCALARS = {
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
"""What an unquoted word may be, and how it may begin: the core schema (YAML 1.2.2, section 10.3.2) with merged keys.
The first that fits counts; what fits nothing is text."""


class RepeatedKeys(yaml.YAMLError):
    """Keys that stand more than once in one mapping, a line each."""


class Loader(yaml.SafeLoader):
    """Safe, with the words of `SCALARS`."""

    yaml_implicit_resolvers: Any = {}


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would not read back as text."""

    yaml_implicit_resolvers: Any = {}


for _name, (_pattern, _first) in SCALARS.items():
    for _kind in (Loader, Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _integer(loader: Loader, node: yaml.ScalarNode) -> int:
    base = {"0o": 8, "0x": 16}.get(node.value[:2], 10)
    return int(node.value, base)


Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def load(content: bytes) -> Any:
    """The value of one document.

    Raises:
        YAMLError: it is no YAML; `RepeatedKeys` with all that stand more than once.
    """
    loader = Loader(content)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        repeated = list(_repeated_keys(node, "", set()))
        if repeated:
            raise RepeatedKeys("\n".join(repeated))
        return loader.construct_document(node)
    finally:
        loader.dispose()


def dump(value: Any) -> str:
    """A document that `load` reads back, keys in their order."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False)


def _repeated_keys(node: yaml.Node, path: str, seen: set[int]) -> Iterator[str]:
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))  # an alias is the node it stands for
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            yield from _repeated_keys(item, f"{path}{place}.", seen)
        return
    lines: dict[tuple[str, str], list[int]] = {}
    for key, value in node.value:
        lines.setdefault((key.tag, str(key.value)), []).append(key.start_mark.line + 1)
        yield from _repeated_keys(value, f"{path}{key.value}.", seen)
    for (_, name), places in lines.items():
        if len(places) > 1:
            different = dict.fromkeys(places)
            where = f"line{'s' * (len(different) > 1)} {', '.join(map(str, different))}"
            yield f"{path}{name} stands {len(places)} times, in {where}; leave one of them"
