"""Published data: numbers in tests/data/published, texts of others outside the repository.

tests/data/published/README.md says where both come from. Tests that need the texts skip where they are absent.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
#: Numbers, in the repository.
NUMBERS = ROOT / "tests" / "data" / "published"
#: Texts, outside it.
DATA = Path(os.environ.get("QUORUM_TEST_DATA") or ROOT.parent / "shared" / "data")
_HOW = "tests/data/published/README.md says where to get them; set QUORUM_TEST_DATA to their folder"
#: Folders that may hold nltk's tokenizers/punkt_tab, beside nltk's own.
_NLTK = (DATA / "ifeval" / "nltk_data", ROOT / "tests" / ".cache" / "nltk_data")


def needs(folder: str) -> pytest.MarkDecorator:
    """Skip where a folder of the published texts is absent."""
    return pytest.mark.skipif(not (DATA / folder).exists(), reason=f"no published texts at {DATA / folder}; {_HOW}")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file, plain or `.gz`."""
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def table(name: str) -> list[dict[str, str]]:
    """Rows of a CSV file of published numbers, plain or `.gz`."""
    data = (NUMBERS / name).read_bytes()
    return list(csv.DictReader((gzip.decompress(data) if name.endswith(".gz") else data).decode().splitlines()))


def nltk_data() -> str | None:
    """Folder of nltk's data with the tokenizer punkt_tab; "" where nltk finds it itself, None where there is none."""
    for folder in _NLTK:
        if (folder / "tokenizers" / "punkt_tab").is_dir():
            return str(folder)
    if importlib.util.find_spec("nltk") is None:
        return None
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return None
    return ""
