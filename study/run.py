"""`python -m study.run`: begin a study, or go on with it. The same command does both."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from search_spaces.recipes import trials_of
from study.arguments import Arguments, parse
from study.config import StudyConfig, wrong_trials
from study.ledger.frozen import fingerprint
from study.paths import StudyPaths
from study.records import Frozen, left_on_disk, read_frozen, study_id
from trainables.caveats import foreseen
from trainables.cli.command import exit_on_input_error
from trainables.cli.passwords import hide_passwords
from trainables.errors import InputError
from trainables.execution.places import MODELS, family_in, open_named
from trainables.execution.signals import stopped_by_signals, stopped_code
from trainables.files import UrlPath, refuse_unusable, remove_tree
from trainables.hub import pinned
from trainables.identity import differences, remembered, source_digest

FREE_BYTES = 500_000_000
"""Needed in the study's folder to begin."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    with exit_on_input_error(), stopped_by_signals("stopped before the study was begun"):
        config = parse(arguments)
        from study.ledger.lease import driver_lock  # not before help was given

        made = prepare_folder(config.paths)
        try:
            with driver_lock(config):
                try:
                    return run(config)
                except InputError:
                    leave_no_trace(config.paths, made)
                    raise
        except KeyboardInterrupt:  # before or after the trials, which have their own handling
            print(f"stopped; to go on: {same_again(config)}", file=sys.stderr)
            return stopped_code()


def same_again(config: Arguments) -> str:
    """What to type to go on, with what may not have been done yet."""
    rerun = ["--rerun", ",".join(config.rerun)] if config.rerun else []
    return " ".join([config.paths.resume_command, *rerun, *["--retry-failed"] * config.retry_failed])


def prepare_folder(paths: StudyPaths) -> list[Path]:
    """Make the study's folder. Returns what was not there before, the innermost first.

    Raises:
        InputError: it cannot be written, or the disk is full.
    """
    if isinstance(paths.root, UrlPath):
        try:
            refuse_unusable(paths.root)
        except OSError as error:
            raise InputError(f"studies_dir: {paths.root} cannot be used: {error.strerror}") from None
        return []
    made = [folder for folder in (paths.root, *paths.root.parents) if not folder.exists()]
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        probe = paths.root / ".writable"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"studies_dir: {paths.root} cannot be written ({error.strerror}); give another --studies-dir"
        ) from None
    free = shutil.disk_usage(paths.root).free
    if free < FREE_BYTES:
        raise InputError(
            f"studies_dir: {paths.root} has {free / 1e6:.0f} MB free, a study needs {FREE_BYTES / 1e6:.0f} MB"
        )
    return made


def leave_no_trace(paths: StudyPaths, made: Sequence[Path]) -> None:
    """Remove the folders that a refused command has made: the study's, unless it was begun, and empty ones above it."""
    if isinstance(paths.root, Path) and paths.root in made and not (paths.config.exists() or left_on_disk(paths)):
        remove_tree(paths.root)
        for folder in (paths.root.parent / ".cache", *made[1:]):
            with suppress(OSError):
                folder.rmdir()


def run(config: Arguments) -> int:
    """Look at what exists, do what is left, say what came out. Returns the exit code."""
    from study.execution.session import Session
    from study.ledger.lease import Lease, leave_at_once
    from study.ledger.ledger import Ledger, read_records
    from study.ledger.ownership import claim
    from study.ledger.set_aside import retry_failed, set_aside
    from study.ledger.store import open_storage, storage_as_input_errors
    from study.ledger.trials import trial_template
    from study.ledger.undo import undone_if_refused

    config = with_revisions(config)
    template = trial_template(config)
    dataset = open_named(template)
    if not config.paths.config.exists():  # later, the fingerprint guards it
        refuse_what_has_no(family_in(template.model), config)
    for caveat in foreseen(template, len(dataset.train.image_ids), len(dataset.evaluation.image_ids)):
        print(f"warning: {caveat.text}", flush=True)
    with ExitStack() as stack:
        undo = stack.enter_context(ExitStack())
        undo.enter_context(undone_if_refused(config))
        storage = open_storage(config.paths, config.storage)
        stack.enter_context(storage_as_input_errors(config))
        lease = stack.enter_context(Lease(storage.engine, config.name, lost=leave_at_once))
        begun = read_frozen(config.paths) if config.paths.config.exists() else None
        mark = fingerprint(config, dataset.digest, code_digest(config.cache))
        found = claim(config, storage, mark, config.accept_changes)
        print(opening_line(config.name, begun, read_frozen(config.paths)), flush=True)
        records = read_records(config.name, storage)
        set_aside(config.paths, records, config.rerun)
        if config.retry_failed:
            retry_failed(config.paths, records)
        ledger = Ledger(config, config.paths, found, database=storage, confirm=lease.confirm)
        template = template.model_copy(update={"owner": study_id(config.paths)})
        session = Session(config, ledger, template, lease)
        if config.tracking.uri is not None:
            undo.pop_all()  # there is an experiment of the study's id
        session.refuse_others(dataset.digest)
        todo = session.left_to_do()
        if todo:
            session.explore(todo)
        ledger.settle()
        return session.close()


def refuse_what_has_no(family: str, config: StudyConfig) -> None:
    """Hold everything that the study may run against the family of its model, which only the base may have told.

    Raises:
        InputError: with everything that the family cannot do.
    """
    model = config.trial.model.model_copy(update={"family": family})
    trial = config.trial.model_copy(update={"model": model})
    drawn = trials_of(config.space, config.recipes, config.protocol.epsilon, config.recipe_temperature)
    problems = wrong_trials(drawn, trial, config.protocol, config.data)
    if problems:
        raise InputError("\n  ".join([f"trial.model.base {model.base} is a {family}:", *problems]))


def opening_line(name: str, begun: Frozen | None, now: Frozen) -> str:
    """Whether the study is new, and what is not as it was when it was last run."""
    if begun is None:
        return f"study {name} is new, with the preset {now.preset}"
    changed = [line for line in differences(begun.config, now.config) if not line.startswith("studies_dir:")]
    return "\n  ".join([f"study {name} goes on with what it was begun with" + ", but for" * bool(changed), *changed])


def code_digest(memory: Path) -> str:
    """Hash of the code that decides results, `trainables` and `search_spaces`; what only reads flags is left out.

    Args:
        memory: see `remembered`.
    """
    import search_spaces
    import trainables

    digest = hashlib.sha256()
    for package in (search_spaces, trainables):
        root = Path(package.__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if name.parts[0] != "cli":
                digest.update(f"{name}\0{remembered(path, memory, source_digest)}\n".encode())
    return digest.hexdigest()[:16]


def with_revisions(config: Arguments) -> Arguments:
    """The study with a revision for every model of the hub: the one that it was begun with, or that is found now."""
    model = config.trial.model
    begun = read_frozen(config.paths).config if config.paths.config.exists() else {}
    known = begun.get("trial", {}).get("model", {})
    found = {
        name: known[name] if str(known.get(name)).startswith(f"{named}@") else pinned(named)
        for name in MODELS
        if (named := getattr(model, name)) is not None
    }
    return config.model_copy(
        update={"trial": config.trial.model_copy(update={"model": model.model_copy(update=found)})}
    )


if __name__ == "__main__":
    hide_passwords()
    sys.exit(main())
