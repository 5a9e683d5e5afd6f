"""Workers forked from a warm process are ordinary workers."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from study.execution.fork_server import CONTEXT, worker_command

SCRIPT = """
    import os, sys
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    import ray
    from study.execution.fork_server import ForkServer

    class Absent(ForkServer):
        def __enter__(self): return self
        def __exit__(self, *_): pass

    with {server}(sys.argv[1]) as server, server.as_python():
        ray.init(address="local", include_dashboard=False, log_to_driver=False)

        @ray.remote(num_cpus=0, runtime_env={{"env_vars": {{"GIVEN": "${{HOME}}/x"}}}})
        class Worker:
            def look(self):
                assert os.environ["GIVEN"] == os.environ["HOME"] + "/x"
                loaded = {{"trainables.training.finetune", "ray.tune", "ray.train.torch"}} <= set(sys.modules)
                from ray._raylet import UniqueID
                return loaded, UniqueID.from_random().hex(), os.getpid()

        workers = [Worker.remote() for _ in range(3)]
        @ray.remote(num_cpus=0)
        def loaded_in_task():
            return "trainables.training.finetune" in sys.modules

        print(ray.get(loaded_in_task.remote()), "task", 0)
        for loaded, drawn, process in ray.get([worker.look.remote() for worker in workers], timeout=100):
            print(loaded, drawn, process)
        ray.shutdown()
"""


@pytest.mark.parametrize(("server", "loaded"), [("ForkServer", "True"), ("Absent", "False")])
def test_forks_are_warm_and_draw_different_ids(server: str, loaded: str, tmp_path: Path) -> None:
    script = textwrap.dedent(SCRIPT.format(server=server))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=150, check=True
    )
    task, *lines = [line.split() for line in done.stdout.splitlines()]
    assert task[0] == loaded
    assert [line[0] for line in lines] == [loaded] * 3
    assert len({line[1] for line in lines}) == 3, "equal ids would make trials swap their workers"
    deadline = time.monotonic() + (0 if server == "ForkServer" else 20)  # Ray does not wait for its own workers to end
    while any(Path(f"/proc/{process}").exists() for _, _, process in lines):
        assert time.monotonic() < deadline, "a worker outlives its cluster"
        time.sleep(0.1)


def test_only_plain_workers_are_forked() -> None:
    ray = ["/ray/setup_worker.py", "/ray/default_worker.py", "--node-ip-address=1", "--language=PYTHON"]
    variables: dict[str, str] = {}
    assert worker_command([*ray, f'{CONTEXT}={{"env_vars": {{"A": "b${{NOT_THERE}}"}}}}'], variables) == ray[1:3]
    assert variables == {"A": "b"}
    assert worker_command([*ray, f"{CONTEXT}="], {}) == ray[1:3]
    assert worker_command(ray[1:3], {}) == ray[1:3]
    assert worker_command([ray[1], "--gcs-address=1.2.3.4:5"], variables) is not None
    assert variables["RAY_ADDRESS"] == "1.2.3.4:5"
    for other in (
        ["/ray/dashboard/agent.py", "--x=1"],
        ["-c", "pass"],
        [],
        [*ray, f'{CONTEXT}={{"py_executable": "/other/python"}}'],
        [*ray, f'{CONTEXT}={{"command_prefix": ["nice"]}}'],
        [ray[0], "-s", *ray[1:]],
    ):
        assert worker_command(other, {}) is None
