"""What tests share: a trial that takes seconds, and the real data where it lies beside the checkout."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.chaos.table import pytest_terminal_summary, tell
from tests.s3_server import S3Server
from trainables.config import (
    DataConfig,
    ModelConfig,
    PretrainConfig,
    Protocol,
    ShapesConfig,
    TinyConfig,
    TrainingConfig,
    TrialConfig,
)
from trainables.files import UrlPath

__all__ = ["pytest_terminal_summary", "tell"]

torch.set_num_threads(1)
os.environ.pop("COLUMNS", None)  # how wide tables are is the tests' to say; xdist tells its workers a width, too

CLUSTERS = ("tests/chaos/", "tests/cluster/")
"""Tests of whole clusters. They take longest, so they come first; and one comes after another: a node of Ray does not
start where its processes, which are many, have not answered within 15 s."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long-chaos", action="store_true", help="kill more often and in more places; takes half an hour")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two tests at a time where all are run; for those that are picked the start of more processes would not pay."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return 2 if everything and not config.getoption("--long-chaos") else 0


class Scheduling(LoadFileScheduling):
    """The tests of a file stay together, and so do those of clusters."""

    def _split_scope(self, nodeid: str) -> str:
        return "clusters" if nodeid.startswith(CLUSTERS) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(CLUSTERS))


@pytest.fixture(scope="session")
def long_chaos(request: pytest.FixtureRequest) -> bool:
    """Whether the long form of a chaos test is asked for."""
    return bool(request.config.getoption("--long-chaos"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """`shared/data` beside the checkout, or where PARETOVL_TEST_DATA says."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("PARETOVL_TEST_DATA", default))
    if not folder.is_dir():  # photographs under their owners' licences are not part of a checkout
        pytest.skip(f"the real data is not at {folder}; set PARETOVL_TEST_DATA")
    return folder.resolve()


@pytest.fixture(scope="session")
def clip_bpe(real_data: Path) -> CLIPTokenizer:
    """CLIP's own, from the published merges."""
    text = gzip.decompress((real_data / "text_resources" / "clip_bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: place for place, entry in enumerate(vocabulary)}, merges=merges)


@pytest.fixture(scope="session")
def tiny_trial(tmp_path_factory: pytest.TempPathFactory) -> TrialConfig:
    """A trial on 64 small images with a model of a few thousand parameters."""
    return TrialConfig(
        data=DataConfig(image_pixels=32, shapes=ShapesConfig(train_images=64, val_images=16, test_images=16)),
        model=ModelConfig(
            tiny=TinyConfig(width=32, layers=1, heads=2, patch_pixels=8, embedding=32),
            pretrain=PretrainConfig(epochs=1, batch_size=16, mlm_epochs=1),
        ),
        training=TrainingConfig(epochs=2, batch_size=8, learning_rate=1e-3, log_every_steps=1),
        protocol=Protocol(gallery_images=12, rung_gallery_images=6, image_steps=2, bootstrap_samples=100),
        cache_dir=tmp_path_factory.mktemp("cache"),
    )


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """On loopback; it goes with the tests."""
    server = S3Server()
    yield server
    server.end()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> UrlPath:
    """A bucket of the test's own."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    name = f"test-{abs(hash(request.node.nodeid))}"
    s3_server.make(name)
    return UrlPath(f"s3://{name}")
