"""Models of the Hugging Face hub: an id stands for one revision, which is found once and kept."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
PINNED = re.compile(rf"({HUB_ID.pattern})@([0-9a-f]{{40}})")
"""A hub id with its revision."""

NEEDED = ["*.json", "*.txt", "*.model", "*.safetensors"]
"""Files of a model: configurations, vocabularies, weights."""

PATIENCE_SECONDS = 10


def pinned(name: str) -> str:
    """A hub id with the revision that it stands for now: the one in this machine's cache, or else the hub's.

    What is no hub id stays as it is, and so does one that nobody here knows.
    """
    if Path(name).exists() or not HUB_ID.fullmatch(name):
        return name
    revision = _cached(name) or _published(name)
    return name if revision is None else f"{name}@{revision}"


def located(name: str) -> str:
    """The folder that holds a hub id's revision, fetched where it is not there; any other name as it is.

    Raises:
        OSError: it is not there, and the hub cannot be reached.
    """
    found = None if Path(name).exists() else PINNED.fullmatch(name)
    if found is None:
        return name
    from huggingface_hub import snapshot_download

    return str(snapshot_download(found[1], revision=found[2], allow_patterns=NEEDED))


def _cached(name: str) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return revision if (folder / "snapshots" / revision).is_dir() else None


def _published(name: str) -> str | None:
    """What the hub says; where its weights are no safetensors, the revision into which it converted them."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    api = HfApi()
    try:
        info = api.model_info(name, timeout=PATIENCE_SECONDS)
        if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or ()):
            refs = api.list_repo_refs(name, include_pull_requests=True).pull_requests or ()
            for ref in refs:
                converted = api.model_info(name, revision=ref.ref, timeout=PATIENCE_SECONDS)
                if any(file.rfilename.endswith(".safetensors") for file in converted.siblings or ()):
                    info = converted
                    break
    except Exception:  # no network, no such model, in whatever words: loading it tells what is wrong
        return None
    return None if info.sha is None else str(info.sha)
