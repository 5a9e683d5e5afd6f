"""The service behind the URLs of buckets: how it is reached, and what its errors mean.

Keys, endpoint and region are the environment's: `AWS_ACCESS_KEY_ID` and its kin, `AWS_ENDPOINT_URL_S3` or
`AWS_ENDPOINT_URL`, `AWS_REGION`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

ATTEMPTS = 8
"""Of one request to S3; the waits between them double from a second on, some 40 s in all."""

FIRST_ATTEMPTS = 3
"""Where it is looked whether a bucket can be used at all."""

REFUSED = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
    "NO_SUCH_BUCKET",
)
"""What S3 says where keys or the bucket are wrong."""

RIGHT = (
    "Give a bucket, and keys that may read, write, list and delete in it: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "~/.aws, or the machine's role; another server than Amazon's or Google's is AWS_ENDPOINT_URL"
)

PASSING = re.compile(r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT)")
"""What S3 says when it is away or too busy."""


class StorageAway(OSError):
    """The storage does not answer. It may again, so whoever needs it can be run again."""


def storage_away(error: BaseException) -> StorageAway | None:
    """That the storage does not answer, if this is what an error came of."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, StorageAway):
        found = found.__cause__ or found.__context__
    return found


def explained(error: OSError, url: str) -> OSError:
    """What an error of the service means, in one line, of the URL."""
    kind = StorageAway if PASSING.search(str(error)) else OSError
    name = re.search(r"AWS Error (\w+)", str(error))
    said = re.sub(r" \(Request ID: .*\)$", "", str(error).partition("operation: ")[2] or str(error))
    if name:
        said = f"{name[1]}: {said}" + f" {RIGHT}" * (name[1] in REFUSED)
    return kind(error.errno or errno.EIO, said, url)


@contextmanager
def errors_of(url: str) -> Iterator[None]:
    """Within, errors carry the URL, as those of files do their name, and what the service said in one line."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
    except OSError as error:
        raise explained(error, url) from None


def file_system(scheme: str, bucket: str, attempts: int) -> Any:
    """A `pyarrow.fs.FileSystem` of the service, with keys, endpoint and region of the environment.

    Args:
        scheme: of the bucket's URL: s3 or gs.
        bucket: its name.
        attempts: of one request.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    return _made(scheme, bucket, endpoint, region, attempts)


@cache
def _made(scheme: str, bucket: str, endpoint: str, region: str, attempts: int) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, GcsFileSystem, S3FileSystem, resolve_s3_region

    if scheme == "gs":
        return GcsFileSystem(retry_time_limit=timedelta(seconds=5 * attempts))
    kind, _, host = endpoint.rpartition("://")
    return S3FileSystem(
        region=region or ("us-east-1" if endpoint else resolve_s3_region(bucket)),
        scheme=kind or "https",
        endpoint_override=host.rstrip("/") or None,
        connect_timeout=5,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=attempts),
        allow_delayed_open=True,  # small objects are put at once, whole
    )
