"""The small world that attacks are tested in."""

from __future__ import annotations

import pytest
from attack_world import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()
