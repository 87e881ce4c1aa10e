"""Decontamination: which prompts with constraints overlap with those of a benchmark."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from ray_pipeline.store.keys import normalise_text

#: Length of a shared run of words that counts as overlap, as in the decontamination of GPT-3's and Llama's data.
GRAM = 13


class Overlap(NamedTuple):
    """How a prompt overlaps with a benchmark.

    Attributes:
        words: runs of GRAM words that both have; a shorter prompt counts as one run.
        combination: the benchmark has a prompt with exactly these constraints, two or more. One constraint is a kind,
            which the benchmark is meant to measure.
    """

    words: int
    combination: bool


class Benchmark:
    """The prompts to keep clear of: their runs of words and their combinations of constraints."""

    def __init__(self, prompts: Iterable[tuple[str, Collection[str]]]) -> None:
        """`prompts`: text and ids of the constraints of each."""
        self._grams: set[tuple[str, ...]] = set()
        self._combinations: set[tuple[str, ...]] = set()
        for text, ids in prompts:
            self._grams |= grams(text)
            self._combinations.add(tuple(sorted(ids)))

    def overlap(self, text: str, ids: Collection[str]) -> Overlap:
        together = tuple(sorted(ids))
        return Overlap(len(grams(text) & self._grams), len(together) > 1 and together in self._combinations)


def grams(text: str, size: int = GRAM) -> set[tuple[str, ...]]:
    """Runs of `size` words of a text, lower case and without punctuation; all its words where it has fewer."""
    words: Sequence[str] = re.findall(r"\w+", normalise_text(text).lower())
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))} if words else set()
