"""A metadata server on loopback, as strict as those of the clouds: a stand-in, as these are on their machines only."""

from __future__ import annotations

import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

LATER = "2030-01-02T03:04:05Z"


class MetadataServer:
    """Of AWS (IMDSv2 only) or GCP.

    Attributes:
        cloud: "AWS", "GCP", or anything else: then it greets.
        action: the text of spot/instance-action, or of instance/preempted; None where AWS has no such item.
        token_seconds: a token is good for.
        status: of every answer but to a request for a token, if it is broken.
        asked: when something other than a token was asked for, in seconds since 1970.
        tokens: given so far.
    """

    def __init__(self, cloud: str, port: int = 0) -> None:
        self.cloud, self.token_seconds, self.status = cloud, 21600.0, None
        self.action: str | None = "FALSE" if cloud == "GCP" else None
        self.asked: list[float] = []
        self.tokens: dict[str, float] = {}
        made = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                wanted = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
                if made.cloud != "AWS" or self.path != "/latest/api/token":
                    self.answer(404)
                elif not (wanted.isdigit() and 1 <= int(wanted) <= 21600) or "X-Forwarded-For" in self.headers:
                    self.answer(400)
                else:
                    token = secrets.token_urlsafe(40)
                    made.tokens[token] = time.time() + min(int(wanted), made.token_seconds)
                    self.answer(200, token)

            def do_GET(self) -> None:
                made.asked.append(time.time())
                if made.status is not None:
                    self.answer(made.status)
                elif made.cloud == "AWS":
                    self.answer_as_aws()
                elif made.cloud == "GCP":
                    self.answer_as_gcp()
                else:
                    self.answer(200, "hello")

            def answer_as_aws(self) -> None:
                if made.tokens.get(self.headers.get("X-aws-ec2-metadata-token", ""), 0) < time.time():
                    self.answer(401)
                elif self.path == "/latest/meta-data/spot/instance-action" and made.action is not None:
                    self.answer(200, made.action)
                else:
                    self.answer(404)

            def answer_as_gcp(self) -> None:
                if self.headers.get("Metadata-Flavor") != "Google":
                    self.answer(403)
                elif self.path == "/computeMetadata/v1/instance/preempted":
                    self.answer(200, made.action or "")
                else:
                    self.answer(404)

            def answer(self, status: int, text: str = "") -> None:
                self.send_response(status)
                if made.cloud == "GCP":
                    self.send_header("Metadata-Flavor", "Google")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead a watcher here, and past this server to nothing else."""
        return {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{self.port}/",
            "GCE_METADATA_HOST": f"127.0.0.1:{self.port}",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Nothing listens on its port any more."""
        self._server.shutdown()
        self._server.server_close()
