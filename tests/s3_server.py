"""An S3 server on loopback: moto's, in a process of its own, with what it holds in its memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time


class S3Server:
    """Started where it is made. Stopped (SIGSTOP) or away, it is as a server that does not answer.

    Args:
        variables: of its environment, which moto reads.
    """

    def __init__(self, **variables: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env={**os.environ, **variables}, **silent)
        end = time.time() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port)).close()
                break
            except OSError:
                assert self.process.poll() is None, "the server has ended"
                assert time.time() < end, "the server does not start"
                time.sleep(0.05)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which it is found."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "correct-horse-battery-staple",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make(self, bucket: str) -> None:
        """A bucket."""
        from pyarrow.fs import S3FileSystem

        S3FileSystem(
            access_key="test",
            secret_key="test",
            region="us-east-1",
            scheme="http",
            endpoint_override=f"127.0.0.1:{self._port}",
            allow_bucket_creation=True,
        ).create_dir(bucket)

    def end(self) -> None:
        """It is gone, with all it held."""
        self.process.kill()
        self.process.wait(30)
