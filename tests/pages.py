"""What a page shows, read back from its HTML."""

from __future__ import annotations

import json
import re
from typing import Any


def traces_of(page: str, name: str) -> dict[str, dict[str, Any]]:
    """The data of the embedded figure `name`, by the names of its traces; those without a name are left out."""
    start = re.search(rf'Plotly\.newPlot\(\s*"{name}",\s*', page)
    assert start is not None, f"no figure {name}"
    data, _ = json.JSONDecoder().raw_decode(page, start.end())
    return {trace["name"]: trace for trace in data if "name" in trace}
