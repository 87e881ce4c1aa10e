"""Published data: numbers in tests/data/published, texts of others outside the repository.

tests/data/published/README.md says where both come from. Tests that need the texts skip where they are absent.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.bench.ifeval.questions import IfevalPrompt

ROOT = Path(__file__).parents[1]
#: Numbers, in the repository.
NUMBERS = ROOT / "tests" / "data" / "published"
#: Texts, outside it.
DATA = Path(os.environ.get("QUORUM_TEST_DATA") or ROOT.parent / "shared" / "data")
_HOW = "tests/data/published/README.md says where to get them; set QUORUM_TEST_DATA to their folder"
#: Folders that may hold nltk's tokenizers/punkt_tab, beside nltk's own.
_NLTK = (DATA / "ifeval" / "nltk_data", ROOT / "tests" / ".cache" / "nltk_data")

#: Two prompts that differ more than this are not the same one (ratio of `difflib`).
_SAME_PROMPT = 0.9


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


def match_responses(
    prompts: Sequence[IfevalPrompt], responses: Sequence[tuple[str, str]]
) -> tuple[dict[int, str], list[int]]:
    """Responses by key, from (prompt, response) pairs as response files hold them: without keys.

    A pair whose prompt is the text of no prompt belongs to the nearest one that is still without a response
    (the published GPT-4 file words one prompt differently).

    Returns:
        key → response, and the keys that were matched by nearness.

    Raises:
        ValueError: a response's prompt is like none of those left, or comes twice.
    """
    by_text = {p.prompt: p.key for p in prompts}
    found: dict[int, str] = {}
    strangers = []
    for text, response in responses:
        if text not in by_text:
            strangers.append((text, response))
        elif by_text[text] in found:
            raise ValueError(f"two responses to the prompt of key {by_text[text]}")
        else:
            found[by_text[text]] = response
    nearest_keys = []
    for text, response in strangers:
        left = [p.prompt for p in prompts if p.key not in found]
        nearest = difflib.get_close_matches(text, left, n=1, cutoff=_SAME_PROMPT)
        if not nearest:
            raise ValueError(f"a response belongs to none of the prompts: {text[:80]!r}")
        found[by_text[nearest[0]]] = response
        nearest_keys.append(by_text[nearest[0]])
    return found, nearest_keys
