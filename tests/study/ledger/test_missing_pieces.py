"""Whatever piece of a study is gone or is somebody else's: it goes on, or one message says why not. Never for ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from study.config import StudyConfig
from study.ledger.ledger import read_records
from study.ledger.remake import EARLIER_ID, FINGERPRINT, ID, asked_on_disk
from study.ledger.set_aside import set_aside
from study.ledger.store import open_storage
from study.records import INFEASIBLE, Event, read_frozen, read_manifest
from study.view import read_study
from tests.chaos.simulated import drive, simulated_study
from tests.study.helpers import complete, opened, run_next, study
from trainables.config import TrialConfig
from trainables.errors import InputError
from trainables.results import Outcome

KEY = "s-t00002-s0"
Damage = Callable[[StudyConfig], object]


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:40])


def in_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def exchange(config: StudyConfig) -> None:
    other = config.paths.manifest("s-t00003-s0").read_text()
    config.paths.manifest(KEY).write_text(other)


def rewrite(path: Path, **fields: str | None) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def older(config: StudyConfig) -> None:
    """A database from before the last trial was asked for, as out of a backup."""
    with open_storage(config.paths, None).engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM trials WHERE number = 5")


def foreign(config: StudyConfig) -> None:
    """The folder is new, and another program has a study of its name in the database."""
    shutil.rmtree(config.paths.root)
    config.paths.root.mkdir()
    made = optuna.create_study(study_name="s", storage=open_storage(config.paths, None))
    made.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)


def added(change: Callable[[optuna.Study], object]) -> Damage:
    """Another program works on the study with plain Optuna."""

    def change_study(config: StudyConfig) -> None:
        change(optuna.load_study(study_name="s", storage=open_storage(config.paths, None)))

    return change_study


def attribute(config: StudyConfig, name: str, value: str) -> None:
    added(lambda study: study.set_user_attr(name, value))(config)


def ended(params: dict[str, float]) -> optuna.trial.FrozenTrial:
    drawn = {name: optuna.distributions.FloatDistribution(0.01, 1, log=True) for name in params}
    return optuna.create_trial(params=params, distributions=drawn, values=[0.9, 0.9])


GOES_ON: dict[str, Damage] = {
    "the folder of an ended trial": lambda c: shutil.rmtree(c.paths.manifest(KEY).parent),
    "a manifest": lambda c: c.paths.manifest(KEY).unlink(),
    "all manifests": lambda c: shutil.rmtree(c.paths.root / "trials"),
    "a log": lambda c: c.paths.events(KEY).unlink(),
    "checkpoints": lambda c: shutil.rmtree(c.paths.runs),
    "a manifest and its checkpoints": lambda c: (c.paths.manifest(KEY).unlink(), shutil.rmtree(c.paths.runs / KEY)),
    "the front": lambda c: c.paths.front.unlink(),
    "the lock": lambda c: c.paths.lock.unlink(),
}
REFUSED: dict[str, tuple[Damage, str]] = {
    "empty manifest": (lambda c: c.paths.manifest(KEY).write_text(""), "empty or cut short"),
    "torn manifest": (lambda c: cut(c.paths.manifest(KEY)), "empty or cut short"),
    "manifest of another version": (
        lambda c: c.paths.manifest(KEY).write_text(
            json.dumps({**json.loads(c.paths.manifest(KEY).read_text()), "x": 1})
        ),
        "x: Extra inputs",
    ),
    "manifest that is no text": (lambda c: c.paths.manifest(KEY).write_bytes(b"\xff\xfe"), "is not the account"),
    "folder in place of a manifest": (lambda c: in_place(c.paths.manifest(KEY)), "cannot be read: Is a directory"),
    "manifest of another trial": (exchange, "is the account of another trial"),
    "manifest of another recipe": (
        lambda c: rewrite(c.paths.manifest("s-t00000-s0"), recipe="fare"),
        "is the account of another trial",
    ),
    "manifest of other data": (
        lambda c: rewrite(c.paths.manifest(KEY), fingerprint="0123456789abcdef"),
        "was measured under other settings, data or code than this study ever had (fingerprint 0123456789abcdef)",
    ),
    "an older database": (older, "the database knows no such trial"),
    "checkpoints of a trial to come": (
        lambda c: (c.paths.runs / "s-t00006-s0").mkdir(),
        "s-t00006-s0: the database knows no such trial",
    ),
    "database": (lambda c: c.paths.database.unlink(), "has no study 's', but"),
    "database before a trial ended": (
        lambda c: (c.paths.database.unlink(), shutil.rmtree(c.paths.root / "trials")),
        "has no study 's', but",
    ),
    "torn database": (lambda c: c.paths.database.write_bytes(b"half" * 999), "file is not a database"),
    "empty database": (lambda c: c.paths.database.write_bytes(b""), "has no study 's', but"),
    "study in the database": (
        lambda c: optuna.delete_study(study_name="s", storage=open_storage(c.paths, None)),
        "has no study 's', but",
    ),
    "study.yaml": (lambda c: c.paths.config.unlink(), "study.yaml, which would say with what settings"),
    "an older study.yaml": (
        lambda c: attribute(c, FINGERPRINT, "0123456789abcdef"),
        "settings that {root}/study.yaml does not know (fingerprint 0123456789abcdef)",
    ),
    "another study of the name": (lambda c: attribute(c, ID, "theirs"), "another study 's' (id theirs, last driven"),
    "manifest of another study": (
        lambda c: rewrite(c.paths.manifest(KEY), study="theirs"),
        "is of another study (id theirs) than this one (id ",
    ),
    "another program's study": (foreign, "with trials that were not made here"),
    "another program's ended trials": (
        added(lambda s: (s.add_trial(ended({"x": 0.1})), s.add_trial(ended({"temperature": 0.1})))),
        "trials that were not made here: 6, 7 (by number)",
    ),
    "another program's waiting trials": (
        added(lambda s: (s.enqueue_trial({"x": 1}), s.enqueue_trial({"temperature": 0.1}))),
        "trials that were not made here: 6, 7 (by number)",
    ),
    "another program's running trial": (added(lambda s: s.ask()), "trials that were not made here: 6 (by number)"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """A study that is done."""
    config = simulated_study(tmp_path_factory.mktemp("whole"), 4)
    drive(config, 0, with_mlflow=False)
    return config


@pytest.fixture
def done(whole: StudyConfig, tmp_path: Path) -> StudyConfig:
    shutil.copytree(whole.paths.root, tmp_path / "s")
    return whole.model_copy(update={"studies_dir": tmp_path})


def is_done(config: StudyConfig) -> bool:
    view = read_study(config.paths)
    return len(view.manifests) == len(view.records) == 6 and "running" not in {record.state for record in view.records}


@pytest.mark.parametrize("piece", GOES_ON)
def test_without_it_the_study_is_done_after_one_more_run(done: StudyConfig, piece: str) -> None:
    assert is_done(done)
    before = {manifest.key: manifest.model_copy(update={"ended": 0}) for manifest in read_study(done.paths).manifests}
    GOES_ON[piece](done)
    drive(done, 0, with_mlflow=False)
    assert is_done(done)
    after = {manifest.key: manifest.model_copy(update={"ended": 0}) for manifest in read_study(done.paths).manifests}
    if piece != "checkpoints":
        assert {key: m.metrics for key, m in after.items()} == {key: m.metrics for key, m in before.items()}
    stored = optuna.load_study(study_name="s", storage=open_storage(done.paths, None)).trials
    assert len(stored) == 6
    drive(done, 0, with_mlflow=False)
    assert is_done(done)


@pytest.mark.parametrize("piece", REFUSED)
def test_without_it_one_message_says_what_to_do(done: StudyConfig, piece: str) -> None:
    damage, expected = REFUSED[piece]
    damage(done)
    database = done.paths.database.read_bytes() if done.paths.database.exists() else b""
    told = set()
    for _ in range(2):
        with pytest.raises(InputError) as refused:
            drive(done, 0, with_mlflow=False)
        told.add(str(refused.value))
    assert len(told) == 1
    assert expected.format(root=done.paths.root) in told.pop()
    assert not database or len(done.paths.database.read_bytes()) >= len(database), "nothing is lost"


def test_a_folder_that_was_renamed_with_its_study_yaml_edited_is_told(done: StudyConfig) -> None:
    renamed = done.model_copy(update={"name": "copy"})
    done.paths.root.rename(renamed.paths.root)
    renamed.paths.config.write_text(renamed.paths.config.read_text().replace("  name: s\n", "  name: copy\n", 1))
    with pytest.raises(InputError, match=r"has no study 'copy', but .*/copy has trials \(6\); studies there: s"):
        drive(renamed, 0, with_mlflow=False)
    with pytest.raises(InputError, match="s-t00000-s0: is of a study of another name"):
        asked_on_disk(renamed.paths)


def test_nobody_counts_another_programs_trials(done: StudyConfig) -> None:
    added(lambda study: study.add_trial(ended({"x": 0.1})))(done)
    with pytest.raises(InputError, match="trials that were not made here: 6 "):
        read_study(done.paths)


def test_what_came_of_a_trial_before_is_kept_and_nothing_else_of_it(tmp_path: Path, database: str) -> None:
    config = study(tmp_path, trials=2)
    ledger = opened(config)
    run_next(ledger, config, complete(0.9, 0.2))
    run_next(ledger, config, Outcome(state="infeasible", reason="Diverged: nan"))
    stopped = ledger.take()
    ledger.rung(stopped, 14, 1, {"clean/mr_r1": 0.1, "both/mr_r1": 0.1})
    ledger.journal.log(stopped, Event(time=1, event="rung", step=14, metrics={"clean/mr_r1": 0.1}, message="is behind"))
    ledger.stop(stopped, "is behind", TrialConfig())
    for record in ledger.records()[:3]:
        config.paths.manifest(record.key).unlink()
    again = opened(config)
    assert again.reopened == [record.key for record in ledger.records()[:3]]
    assert again.remaining().resume == [0, 1, 2]
    assert again.journal.verdict(again.records()[2]) == "is behind", "its log still says so: nothing is trained for it"
    assert [(r.params, r.recipe) for r in again.records()] == [(r.params, r.recipe) for r in ledger.records()]
    trials = again._storage.whole()
    assert trials[0].user_attrs["earlier"] == [{"state": "COMPLETE", "values": [0.9, 0.2], "reason": None}]
    assert INFEASIBLE not in trials[1].user_attrs
    assert not any("constraint" in name for name in trials[1].system_attrs)
    assert trials[0].values is None
    for number in range(3):
        again.finish(again.take(number), complete(0.8, 0.3), TrialConfig())
    ended = opened(config)
    assert ended.reopened == []
    assert [record.state for record in ended.records()] == ["complete"] * 3
    assert read_manifest(config.paths.manifest(stopped.key)) is not None


def test_two_folders_do_not_share_a_study_of_a_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first, second = (simulated_study(tmp_path / name, 2, storage=url) for name in ("a", "b"))
    drive(first, 0, with_mlflow=False)
    for _ in range(2):
        with pytest.raises(InputError, match=r"another study 's' \(id \w+, last driven from .*use another --name"):
            drive(second, 0, with_mlflow=False)
    assert not second.paths.config.exists()
    drive(first, 0, with_mlflow=False)
    shutil.copytree(first.paths.root, second.paths.root, dirs_exist_ok=True)
    second.paths.config.write_text(first.paths.config.read_text().replace("id: ", "id: x"))
    for use in (lambda: drive(second, 0, with_mlflow=False), lambda: read_study(second.paths)):
        with pytest.raises(InputError, match="another study 's'"):
            use()


@pytest.mark.parametrize("kept", [True, False])
def test_a_study_of_an_earlier_version_keeps_the_id_that_it_had(done: StudyConfig, kept: bool) -> None:
    storage = open_storage(done.paths, None)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM study_user_attributes")
    for path in done.paths.root.glob("trials/*/manifest.json"):
        rewrite(path, study=None)
    text = done.paths.config.read_text()
    done.paths.config.write_text(text.replace(next(line for line in text.split("\n") if line.startswith("id: ")), ""))
    if kept:
        done.paths.earlier_id.write_text("before\n")
        attribute(done, EARLIER_ID, "before")
    drive(done, 0, with_mlflow=False)
    attributes = optuna.load_study(study_name="s", storage=storage).user_attrs
    assert attributes[ID] == read_frozen(done.paths).id
    assert not kept or attributes[ID] == "before"
    assert attributes[FINGERPRINT] == read_frozen(done.paths).hash


def test_a_stop_between_making_the_study_and_claiming_it(tmp_path: Path) -> None:
    config = simulated_study(tmp_path, 2)
    config.paths.root.mkdir(parents=True)
    optuna.create_study(study_name="s", storage=open_storage(config.paths, None), directions=["maximize"] * 2)
    drive(config, 0, with_mlflow=False)
    assert len(read_study(config.paths).manifests) == 4


def test_a_chosen_trial_runs_again_and_counts_once(done: StudyConfig) -> None:
    before = read_study(done.paths)
    chosen = next(record for record in before.records if record.recipe is None)
    old = done.paths.manifest(chosen.key).read_text()
    front = done.paths.front.read_text()
    storage = open_storage(done.paths, None)
    with pytest.raises(InputError, match="rerun: no trial s-t00099-s0; trials are s-t00000-s0, s-t00001-s0"):
        set_aside(done.paths, read_records("s", storage), [chosen.key, "s-t00099-s0"])
    assert done.paths.manifest(chosen.key).exists()
    set_aside(done.paths, read_records("s", storage), [chosen.key])
    assert [r.key for r in read_study(done.paths).records if r.state == "running"] == [chosen.key]
    assert not (done.paths.runs / chosen.key).exists(), "nothing of it is gone on with"
    aside = done.paths.root / "set_aside" / chosen.key
    assert (aside / "1" / chosen.key / "manifest.json").read_text() == old
    assert (aside / "1" / "run").is_dir()
    drive(done, 0, with_mlflow=False)
    assert is_done(done)
    after = read_study(done.paths)
    assert [(r.number, r.key, r.params) for r in after.records] == [(r.number, r.key, r.params) for r in before.records]
    assert [r.reruns for r in after.records] == [int(r.key == chosen.key) for r in after.records]
    assert done.paths.front.read_text() == front, "the trial ends as its point says, so it counts as before, and once"
    set_aside(done.paths, read_records("s", storage), [chosen.key])
    set_aside(done.paths, read_records("s", storage), [])
    drive(done, 0, with_mlflow=False)
    assert {path.name for path in aside.iterdir()} == {"1", "2"}
