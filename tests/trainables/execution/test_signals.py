"""A command that is asked to end does so in order, and says how to go on."""

import os
import signal
import subprocess
import sys

import pytest

from trainables.execution.signals import held_back, stopped_by_signals, stopped_code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_a_command_with_its_message(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, stopped_by_signals("stopped; go on so"):
        os.kill(os.getpid(), number)
    assert (ended.value.code, capsys.readouterr().err) == (code, "stopped; go on so\n")
    assert signal.getsignal(number) is before


def test_what_must_not_be_cut_short_is_not() -> None:
    done = []

    def start() -> None:
        with held_back():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)

    with stopped_by_signals(""), pytest.raises(KeyboardInterrupt):
        start()
    assert done
    assert stopped_code() == 130
    with stopped_by_signals(""), pytest.raises(KeyboardInterrupt), held_back():
        sys.exit(15)  # as Ray's own handler of SIGTERM
    assert stopped_code() == 75


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_a_study_is_stopped_in_order_while_ray_starts(tmp_path, number: str, code: int) -> None:
    script = f"""
import os, signal, sys
import ray
def init(**_):
    os.kill(os.getpid(), signal.{number})
ray.init = init
from study.run import main
sys.exit(main(["--name", "s", "--studies-dir", sys.argv[1], "--data.shapes.train-images", "40"]))
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == code, run.stderr
    assert "to go on: python -m study.run --name s" in run.stdout.replace("\n", " ")
    assert "nothing could be done" not in run.stdout
    assert "Traceback" not in run.stderr


def test_a_refused_command_leaves_no_folder(tmp_path) -> None:
    command = [sys.executable, "-m", "study.run", "--studies-dir", str(tmp_path / "a/b"), "--data.root", "/nothing"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert list(tmp_path.iterdir()) == []
