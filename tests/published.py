"""Published data that nobody here wrote, beside the project; tests that need it skip where it is absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "shared" / "data"


def needs(folder: str) -> pytest.MarkDecorator:
    """Skip, with the reason, where a folder of the published data is not there."""
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"published data not found at {DATA / folder}")


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
