"""Passwords in URLs, however they are written, are not in what is shown or kept."""

from __future__ import annotations

import random
from urllib.parse import quote

import pytest

from study.config import StudyConfig
from study.view import with_passwords
from trainables.cli.passwords import handed_over
from trainables.errors import redacted, without_password

SCHEMES = ("postgresql", "postgresql+psycopg", "mysql+pymysql", "http", "https", "s3", "ray", "redis")
WORDS = ("hush", "Tr0ub4dor", "corr:ect", "ho@rse", "st/aple", "100%25", "a%40b", "#x?y", "p&q=r", "\u00fc")
NAMES = (
    "password",
    "sslpassword",
    "passwd",
    "token",
    "access_token",
    "sig",
    "X-Amz-Signature",
    "api_key",
    "client_secret",
)


def drawn(draw: random.Random) -> tuple[str, list[str]]:
    """A URL, and what must not be seen of it."""
    password = "Zq" + "".join(draw.choices(WORDS, k=draw.choice([1, 2])))
    host = ",".join(draw.sample(["db", "db:5432", "10.0.0.7:80", "[::1]:5432"], draw.choice([1, 1, 2])))
    secrets = []
    user = draw.choice(["", "me@", "me:", ":"])
    if user.endswith(":"):
        shown = draw.choice([password, quote(password, safe="")])
        user, secrets = f"{user}{shown}@", [shown]
    url = f"{draw.choice(SCHEMES)}://{user}{host}/x"
    asked = []
    for name in draw.sample(NAMES, draw.choice([0, 0, 1, 2])):
        secrets.append("Zk" + quote(password, safe=""))
        asked.append(f"{name}={secrets[-1]}")
    if asked:
        asked += draw.sample(["sslmode=require", "a=b"], draw.choice([0, 1, 2]))
        draw.shuffle(asked)
        url += "?" + "&".join(asked)
    return url, secrets


def test_no_password_of_any_url_is_shown_or_kept() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        urls = [drawn(draw) for _ in range(draw.choice([1, 1, 2, 3]))]
        text = draw.choice([" ", "\n", " and ", ", "]).join(
            draw.choice(["{}", "'{}'", "at {}: no", "({})"]).format(url) for url, _ in urls
        )
        shown = redacted(text)
        for url, secrets in urls:
            kept = without_password(url)
            for secret in secrets:
                assert secret not in shown, (text, shown)
                assert secret not in kept, (url, kept)
            assert "***" not in kept
            assert redacted(kept) == kept
            if not secrets:
                assert url in shown
                assert kept == url
        assert redacted(shown) == shown


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("postgresql://me:secret@db:5432/x", "postgresql://me@db:5432/x"),
        ("postgresql://me@db/x?password=secret", "postgresql://me@db/x"),
        ("postgresql://me@db/x?sslmode=require&password=secret", "postgresql://me@db/x?sslmode=require"),
        ("postgresql://me@db/x?password=secret&sslmode=require", "postgresql://me@db/x?sslmode=require"),
        ("https://:secret@host:5000", "https://@host:5000"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
    ],
)
def test_what_is_kept_of_a_url(url: str, kept: str) -> None:
    assert without_password(url) == kept


def test_the_rest_of_a_message_stays() -> None:
    text = "trial.model.max_tokens=77: 'http://127.0.0.1:5000/#/experiments/1' and dsn host=db password='a b' port=1"
    assert redacted(text) == text.replace("'a b'", "***")


def test_a_command_line_is_cleared_of_passwords_only() -> None:
    uri = "http://me:hush@host:5000"
    given = ["--name", "mine", "--tracking.uri", uri, "--storage=postgresql://me:hush@db/x", "--budget.trials", "3"]
    kept, variables = handed_over([*given, "--accept-changes", "--tracking-uri", uri, "--cluster.address", "h:1"])
    assert kept == ["--name", "mine", "--budget.trials", "3", "--accept-changes", "--cluster.address", "h:1"]
    assert variables == {"PARETOVL_TRACKING__URI": uri, "PARETOVL_STORAGE": "postgresql://me:hush@db/x"}
    assert handed_over(["--storage", "postgresql://me:it's mine@db/x"])[0] == []
    assert handed_over(["--storage", "postgresql://me@db/x"]) == (["--storage", "postgresql://me@db/x"], {})


def test_later_commands_find_the_password_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudyConfig.model_validate({"storage": "postgresql://me@db/x", "tracking": {"uri": "http://me@host"}})
    monkeypatch.setenv("PARETOVL_STORAGE", "postgresql://me:hush@db/x")
    monkeypatch.setenv("PARETOVL_TRACKING__URI", "http://me:hush@another")
    found = with_passwords(config)
    assert found.storage == "postgresql://me:hush@db/x"
    assert found.tracking.uri == "http://me@host", "another server is not the study's"
