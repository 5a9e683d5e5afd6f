"""What may be typed for a cluster's file: what would mean something else there is refused."""

from __future__ import annotations

import pytest
import yaml

from study import cluster
from study.clusters.files.typed import plain
from trainables.errors import InputError


@pytest.mark.parametrize("text", ["a b", "a;b", "$(id)", "`id`", "it's", 'a"b', "a #b", "a&b", "a: b", "*x", "{}"])
def test_what_a_shell_or_yaml_would_read_otherwise(text: str) -> None:
    with pytest.raises(ValueError, match="without quotes"):
        plain(text)


@pytest.mark.parametrize("text", ["on", "0", "1.0e+3", "null", "2026-11-27", "1:30", "~"])
def test_what_yaml_reads_as_no_text(text: str) -> None:
    with pytest.raises(ValueError, match="YAML reads it"):
        plain(text)


@pytest.mark.parametrize(
    "text",
    ["", "/mnt/a-b_c.d", "~/.ssh/key", "registry:5000/a@sha256:0", "karpenter.sh/capacity=spot", "10.0.0.1"],
)
def test_what_means_the_same_everywhere(text: str) -> None:
    assert plain(text) == text
    assert text == "" or yaml.safe_load(text) == text


MISTAKES = {
    "aws": {
        "--bucket s3://b --storage postgresql://me@h/db": "bucket: give the name of a bucket alone",
        "--bucket my-b --storage postgresql://me:hush@h/db": "storage: holds a password",
        "--bucket my-b --storage sqlite:///x.db": "storage: give the URL of a server",
        "--zones us-east-1a": "zones: us-east-1a is not in the region us-west-2",
        "--region mars-1": "region: give a region",
        "--machines g6.2xlarge,g6.2xlarge": "machines: one of the list is there twice",
        "--idle-minutes inf": "idle_minutes: Input should be less than or equal to 120",
        "--idle-minutes 0.5": "idle_minutes: Input should be greater than or equal to 1",
    },
    "gcp": {"--zone us-central1": "zone: give a zone", "--project My": "project: give the id of a project"},
    "local": {
        "--head 127.0.0.1": "head: give an address by which",
        "--head 10.0.0.1:22": "head: give an address by which",
        "--workers me@10.0.0.2": "workers.0: give an address by which",
        "--head 10.0.0.1 --workers 10.0.0.1": "workers: 10.0.0.1 is the head",
        "--workers 10.0.0.2,10.0.0.2": "workers: one of the list is there twice",
        "--shared studies": "shared: give a path from / on",
    },
    "kuberay": {
        "--cluster-name My_Study": "cluster_name: give lower-case letters",
        f"--cluster-name {48 * 'a'}": "cluster_name: give lower-case letters",
        "--claim My": "claim: give lower-case letters",
        "--hours inf": "hours: give a number that is finite",
        "--hours 0.00001": "hours: Input should be greater than or equal to 0.1",
    },
    "slurm": {"--cache tmp": "cache: give a path from / on", "--hours inf": "hours: give a number that is finite"},
}


@pytest.mark.parametrize(("provider", "flags"), [(name, flags) for name, found in MISTAKES.items() for flags in found])
def test_values_that_a_provider_would_not_take(provider: str, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cluster.main(["--provider", provider, *flags.split()])
    out, told = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert MISTAKES[provider][flags] in told
    assert "hush" not in told


def test_a_head_that_is_too_small_for_the_trials() -> None:
    flags = ["--machines", "g6.48xlarge", "--nodes", "7"]
    with pytest.raises(InputError, match=r"^head: m6i.2xlarge holds 51 trials at once .*, and 56 would run; take"):
        cluster.text(cluster.parse(flags))
    assert "m6i.4xlarge" in cluster.text(cluster.parse([*flags, "--head", "m6i.4xlarge"]))
