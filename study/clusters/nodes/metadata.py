"""What a cloud's metadata server tells a machine about its own end.

Both clouds have one on every machine, at an address that leads nowhere else; it answers in milliseconds and costs
nothing. Asked is only what is sure to come and when: a rebalance recommendation of AWS is often followed by nothing,
and GCP maintains the host of a spot machine by preempting it. Written with the standard library alone: see
`study.clusters.nodes.notices`.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

ADDRESS = "http://169.254.169.254"
"""Of both clouds. AWS_EC2_METADATA_SERVICE_ENDPOINT and GCE_METADATA_HOST name another, as they do for the clouds' own
libraries."""

ANSWER_SECONDS = 1.0
"""A metadata server that needs longer is away."""

ANSWER_BYTES = 10_000
"""Read of an answer; a longer one is not what was asked for."""

AWS_NOTICE_SECONDS = 120.0
"""Between the notice and the end, where the notice does not say when."""

GCP_NOTICE_SECONDS = 30.0
"""The same on GCP, whose notice never says when."""

TOKEN_SECONDS = 21600
"""A token of AWS is good for; the longest there is."""


class Notice(NamedTuple):
    """This machine will be taken away.

    Attributes:
        deadline: when, in seconds since 1970.
        reason: what the cloud said, for people.
    """

    deadline: float
    reason: str


class NoAnswer(Exception):
    """The server is away, or what it said is no answer; the text says which."""


class Cloud(Protocol):
    """A cloud's metadata server."""

    name: str

    def there(self) -> bool:
        """Whether this machine is in the cloud.

        Raises:
            NoAnswer: nobody can tell now.
        """

    def notice(self, now: float) -> Notice | None:
        """Ask; None if the machine stays.

        Args:
            now: in seconds since 1970.

        Raises:
            NoAnswer: see there.
        """


class Answer(NamedTuple):
    """Of an HTTP server; the names of `headers` are in lower case."""

    status: int
    text: str
    headers: Mapping[str, str]


def ask(server: str, path: str, headers: Mapping[str, str], method: str = "GET") -> Answer:
    """One request, past any proxy: these servers cannot be reached by way of one.

    Raises:
        NoAnswer: see there.
    """
    url = urlsplit(server)
    try:
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=ANSWER_SECONDS)
        try:
            connection.request(method, url.path.rstrip("/") + path, headers=dict(headers))
            answer = connection.getresponse()
            text = answer.read(ANSWER_BYTES).decode("utf-8", "replace")
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswer(f"{server} does not answer ({str(error) or type(error).__name__})") from None
    return Answer(answer.status, text, {name.lower(): value for name, value in answer.getheaders()})


class Aws:
    """Spot instances, by version 2 of the instance metadata service."""

    name = "AWS"

    def __init__(self) -> None:
        self._server = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ADDRESS
        self._token = ""

    def there(self) -> bool:
        """It gives tokens."""
        return self._renewed()

    def notice(self, now: float) -> Notice | None:
        """The item `spot/instance-action`, which is there only when the end is near."""
        for _ in range(2):
            answer = ask(
                self._server, "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self._token}
            )
            if answer.status != 401:
                break
            self._renewed()  # there was none yet, or it is too old
        return None if answer.status == 404 else aws_notice(_text(answer, "spot/instance-action"), now)

    def _renewed(self) -> bool:
        wanted = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        answer = ask(self._server, "/latest/api/token", wanted, "PUT")
        self._token = answer.text.strip() if answer.status == 200 else ""
        return self._token.isascii() and self._token.isprintable() and bool(self._token)


def aws_notice(text: str, now: float) -> Notice:
    """The item `spot/instance-action`, as `{"action": "terminate", "time": "2026-11-27T08:22:00Z"}`.

    Args:
        text: of the item. Without a time that can be read, the usual notice is assumed.
        now: in seconds since 1970.

    Raises:
        NoAnswer: it names no action.
    """
    try:
        said = json.loads(text)
        action = said["action"]
    except (ValueError, TypeError, KeyError):
        raise NoAnswer(f"spot/instance-action is {text[:80]!r}, which names no action") from None
    try:
        at = datetime.strptime(said["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except (ValueError, TypeError, KeyError):
        return Notice(now + AWS_NOTICE_SECONDS, f"AWS will {action} this instance soon")
    return Notice(at, f"AWS will {action} this instance at {said['time']}")


class Gcp:
    """Spot and preemptible machines of Compute Engine."""

    name = "GCP"

    def __init__(self) -> None:
        host = os.environ.get("GCE_METADATA_HOST")
        self._server = f"http://{host}" if host else ADDRESS

    def there(self) -> bool:
        """Its answers are marked."""
        answer = self._preempted()
        return answer.status == 200 and answer.headers.get("metadata-flavor") == "Google"

    def notice(self, now: float) -> Notice | None:
        """The value `instance/preempted`, which says nothing of the time."""
        preempted = _text(self._preempted(), "instance/preempted").strip()
        if preempted not in ("TRUE", "FALSE"):
            raise NoAnswer(f"instance/preempted is {preempted[:80]!r}, neither TRUE nor FALSE")
        return Notice(now + GCP_NOTICE_SECONDS, "GCP preempts this machine") if preempted == "TRUE" else None

    def _preempted(self) -> Answer:
        return ask(self._server, "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})


def _text(answer: Answer, name: str) -> str:
    if answer.status != 200:
        raise NoAnswer(f"{name}: the metadata server answers with status {answer.status}")
    return answer.text
