"""Attacks by name: ours, those of torchattacks, and classes from a file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from trainables.attacks.apgd import Apgd
from trainables.attacks.characters import CharacterAttack
from trainables.attacks.cmi import CmiAttack
from trainables.attacks.co_attack import CoAttack
from trainables.attacks.contract import Attack
from trainables.attacks.image import Pgd, TorchAttack
from trainables.attacks.itm import ItmAttack
from trainables.attacks.joint import Both, Joint
from trainables.attacks.natural import CaptionNoise, Corruption
from trainables.attacks.quirks import Quirks
from trainables.attacks.search import TextSearch
from trainables.attacks.sep import SepAttack
from trainables.attacks.sga import Dra, Sga
from trainables.attacks.text import BertAttack
from trainables.attacks.transfer import Transfer
from trainables.config import AttackConfig, Protocol
from trainables.config.fields import parse_epsilon
from trainables.errors import InputError

BUILT_IN: dict[str, type[Attack]] = {
    "image": Pgd,
    "text": TextSearch,
    "both": Both,
    "apgd": Apgd,
    "joint": Joint,
    "transfer": Transfer,
    "bert": BertAttack,
    "sep": SepAttack,
    "characters": CharacterAttack,
    "co": CoAttack,
    "sga": Sga,
    "dra": Dra,
    "cmi": CmiAttack,
    "corruption": Corruption,
    "caption-noise": CaptionNoise,
    "itm": ItmAttack,
}


def build_attacks(protocol: Protocol) -> dict[str, Attack]:
    """The protocol's attacks by name.

    Raises:
        InputError: see `build_attack`.
    """
    return {config.name: build_attack(config, protocol) for config in protocol.attacks}


def build_attack(config: AttackConfig, protocol: Protocol) -> Attack:
    """The attack with the protocol's budget, changed where the config's options say so.

    What a class from a file gives a default keeps it: whoever writes `epsilon: float = 1.0` means that radius.

    Raises:
        InputError: no such attack, or options it does not have.
    """
    where = f"protocol.attacks, {config.name}"
    options: dict[str, Any] = {name: _number_of(value) for name, value in config.options.items()}
    if config.attack.startswith("torchattacks:"):
        kind = config.attack.partition(":")[2]
        accepted = TorchAttack.accepted(kind)
        if not accepted:
            raise InputError(f"{where}: torchattacks has no L-infinity attack {kind!r}; for example PGD, APGD, Square")
        own: dict[str, Any] = {name: options.pop(name) for name in ("epsilon", "steps") if name in options}
        unknown = sorted(set(options) - accepted)
        if unknown:
            raise InputError(f"{where}: {kind} takes no {', '.join(unknown)}; it takes {', '.join(sorted(accepted))}")
        options = {**own, "kind": kind, "parameters": tuple(options.items())}
        kind_of: type[Attack] = TorchAttack
    elif ":" in config.attack:
        kind_of = _from_file(config.attack, where)
    elif config.attack in BUILT_IN:
        kind_of = BUILT_IN[config.attack]
    else:
        raise InputError(
            f"{where}: no attack {config.attack!r}; there are {', '.join(BUILT_IN)}, torchattacks:NAME, FILE.py:CLASS"
        )
    assert dataclasses.is_dataclass(kind_of)  # the base class is none, but every attack is: `_from_file` sees to it
    names = {field.name for field in dataclasses.fields(kind_of)}
    kept = _valued(kind_of) if config.file else set()
    budget = {
        "epsilon": protocol.epsilon,
        "words": protocol.words,
        "steps": protocol.image_steps,
        "candidates": protocol.candidates,
    }
    unknown = sorted(set(options) - names)
    if unknown:
        raise InputError(f"{where}: no option {', '.join(unknown)}; options are {', '.join(sorted(names))}")
    if "quirks" in options:
        options["quirks"] = _quirks(options["quirks"], kind_of, where)
    values = {**{name: value for name, value in budget.items() if name in names - kept}, **options}
    try:
        return TypeAdapter(kind_of).validate_python(values)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})" for e in error.errors())
        raise InputError(f"{where}: {told}") from None


def _valued(kind: type[Attack]) -> set[str]:
    """What the class or those it is derived from give a value; a bare annotation inherits that of `Attack`."""
    return {name for part in kind.__mro__[: kind.__mro__.index(Attack)] for name in vars(part)}


def _quirks(given: object, kind_of: type[Attack], where: str) -> Quirks:
    known = kind_of.known_quirks
    if given == "compat":
        return known
    if not isinstance(given, list) or not set(map(str, given)) <= known:
        raise InputError(f"{where}: quirks are `compat` for all of them, or a list of {', '.join(sorted(known))}")
    return frozenset(given)


def _number_of(value: JsonValue) -> object:
    """Radii as the papers write them become numbers; files have slashes, too."""
    try:
        return parse_epsilon(value)
    except ValueError:
        return value


def _from_file(name: str, where: str) -> type[Attack]:
    file, _, attribute = name.rpartition(":")
    path = Path(file).resolve()
    module_name = f"paretovl_attack_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise InputError(f"{where}: no Python file {path}; write FILE.py:CLASS")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise InputError(f"{where}: {path} cannot be imported ({type(error).__name__}: {error})") from error
    found = getattr(sys.modules[module_name], attribute, None)
    if not (isinstance(found, type) and issubclass(found, Attack) and dataclasses.is_dataclass(found)):
        raise InputError(f"{where}: {path} has no frozen dataclass {attribute!r} derived from Attack")
    return found
