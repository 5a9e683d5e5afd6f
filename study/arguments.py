"""What commands take: preset, begun study, YAML file, `PARETOVL_...` variables and flags, put together."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, overload

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from study.config import StudyConfig
from study.paths import StudyPaths
from study.records import read_frozen
from trainables.cli.command import read_yaml
from trainables.cli.flags import Flags, from_command_line
from trainables.config.fields import Place, Separated
from trainables.errors import InputError
from trainables.files import Location, location

PRESETS = Path(__file__).parent / "presets"


def known_presets() -> list[str]:
    """Their names."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


class Arguments(StudyConfig, Flags):
    """Explore how contrastive weight, temperature and training attack decide robustness; run again to go on.

    Later wins: preset, what the study was begun with, config file, PARETOVL_... variables (PARETOVL_BUDGET__TRIALS),
    flags.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m study.run")
    common_fields: ClassVar[tuple[str, ...]] = (
        *("preset", "config", "name", "data.root", "data.image_pixels", "trial.model.base", "trial.training.epochs"),
        *("trial.training.learning_rate", "protocol.epsilon", "protocol.gallery_images", "objectives", "space"),
        *("budget.trials", "budget.wall_hours", "trial.workers.count", "cluster.address"),
    )
    example_commands: ClassVar[tuple[str, ...]] = (
        "python -m study.run",
        "python -m study.run --preset coco_clip_b16 --data.root DIR --budget.trials 24",
        "python -m study.run --name mine --config my_study.yaml",
        "python -m study.run --preset coco_clip_b16 --help protocol",
    )

    preset: str = Field("quickstart", description=f"a ready study: {', '.join(known_presets())}")
    config: Place | None = Field(None, description="YAML file with any of these fields")
    rerun: Annotated[tuple[str, ...], Separated] = Field(
        (), description="ended trials to run again, by key; what came of them is kept in set_aside/"
    )
    retry_failed: bool = Field(
        False, description="run the trials that failed again, from their checkpoints; not infeasible ones"
    )
    accept_changes: bool = Field(False, description="go on with a study whose fingerprint differs, and record it")


Given = TypeVar("Given", bound=Arguments)


@overload
def parse(arguments: Sequence[str] | None = None, *, begun: bool = True) -> Arguments: ...
@overload
def parse(arguments: Sequence[str] | None, schema: type[Given], *, begun: bool = True) -> Given: ...
def parse(
    arguments: Sequence[str] | None = None, schema: type[Arguments] = Arguments, *, begun: bool = True
) -> Arguments:
    """The study that the command line, the environment, a file and a preset describe together.

    One that was begun goes on with what it was begun with, wherever nothing else is given.

    Args:
        arguments: of the command line; None: those of this process.
        schema: what the command takes besides.
        begun: whether to look for a study of the name, which may be where this machine cannot look.

    Raises:
        InputError: with all mistakes at once.
        SystemExit: after --help.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default=os.environ.get("PARETOVL_PRESET"))
    early.add_argument("--config", default=os.environ.get("PARETOVL_CONFIG"))
    early.add_argument("--name", default=os.environ.get("PARETOVL_NAME"))
    early.add_argument("--studies-dir", default=os.environ.get("PARETOVL_STUDIES_DIR"))
    where, _ = early.parse_known_args(given)
    own = {} if where.config is None else read_yaml(_place("config", where.config))
    values = _preset(where.preset or "quickstart")
    name = where.name or own.get("name", values["name"])
    root = _place("studies_dir", where.studies_dir or own.get("studies_dir", "studies"))
    paths = StudyPaths(root / str(name))
    what = "the study's configuration"
    if begun and paths.config.exists():
        frozen = read_frozen(paths)
        if where.preset is not None and frozen.preset not in (None, where.preset):
            raise InputError(
                f"preset {where.preset!r}: study {name!r} was begun with {frozen.preset!r}; leave --preset out, or use "
                "another --name"
            )
        if where.preset is None or frozen.preset is not None:
            values = {**frozen.config, "preset": frozen.preset or "quickstart"}
            values |= {"name": name, "studies_dir": paths.root.parent}
            what = f"{paths.config} and what is given beside it"
    return from_command_line(schema, given, _merged(values, own), what)


def _place(field: str, value: object) -> Location:
    try:
        return location(value)
    except ValueError as error:
        raise InputError(f"{field}: {error}") from None


def _preset(name: str) -> dict[str, Any]:
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"preset {name!r}: there is none of that name; presets are {', '.join(known_presets())}")
    return {"name": name, **read_yaml(path)}


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge, anything else is replaced; a space is replaced whole."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict) and name != "space"
        merged[name] = _merged(merged[name], value) if both else value
    return merged
