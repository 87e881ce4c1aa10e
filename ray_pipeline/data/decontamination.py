"""Decontamination: texts of a run that overlap with a benchmark, found and counted (`prompts.decontaminate`).

Two texts overlap where they share a run of 13 words, as in the decontamination of GPT-3's data (Brown et al. 2020,
appendix C), or are equal word for word. Words are runs of letters, digits and underscores after NFKC and case folding,
so blanks, line ends, punctuation and case make no difference. A text of fewer than 13 words overlaps only with an equal
one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.sources import InputError, PromptSource, digests_of, named_sources, pinned, source_from
from ray_pipeline.extensions import find, names

#: Words of a run that counts as overlap.
GRAM = 13
#: Of GRAM words in a row, so many begin at a multiple of their number: what a long text is searched for first.
_BLOCK = (GRAM + 1) // 2
_WORD = re.compile(r"\w+")

_Words = tuple[str, ...]


def words_of(text: str) -> _Words:
    """The words by which texts are compared."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def grams(words: _Words) -> set[_Words]:
    """All runs of GRAM words; all words where there are fewer, and nothing where there are none."""
    return {words[i : i + GRAM] for i in range(max(1, len(words) - GRAM + 1))} if words else set()


class Overlaps:
    """The texts of benchmarks, to hold other texts against. In memory are the benchmarks alone."""

    def __init__(self, benchmarks: Mapping[str, Iterable[str]]) -> None:
        """`benchmarks`: the texts of each, by name."""
        self.sizes = dict.fromkeys(benchmarks, 0)
        self._whole: dict[_Words, set[str]] = {}
        self._grams: dict[_Words, set[str]] = {}
        self._blocks: set[_Words] = set()
        for name, texts in benchmarks.items():
            for text in texts:
                self.sizes[name] += 1
                self._add(name, words_of(text))

    def _add(self, name: str, words: _Words) -> None:
        if not words:
            return
        self._whole.setdefault(words, set()).add(name)
        for gram in grams(words):
            self._grams.setdefault(gram, set()).add(name)
        if len(words) >= GRAM:
            self._blocks.update(words[i : i + _BLOCK] for i in range(len(words) - _BLOCK + 1))

    def of(self, text: str) -> dict[str, bool]:
        """Name of each benchmark that the text overlaps with → whether a text of it is equal."""
        words = words_of(text)
        if len(words) >= GRAM and not any(
            words[i : i + _BLOCK] in self._blocks for i in range(0, len(words) - _BLOCK + 1, _BLOCK)
        ):
            return {}
        equal = self._whole.get(words, ())
        shared = {name for gram in grams(words) for name in self._grams.get(gram, ())}
        return {name: name in equal for name in sorted(shared)}


# --- settings ---------------------------------------------------------------------------------------------------------


def _against(values: Any) -> PromptSource:
    """A benchmark by its name or with its keys, or any prompt source."""
    if isinstance(values, str):
        values = {"type": values}
    kind = values.get("type") if isinstance(values, Mapping) else None
    if not isinstance(kind, str) or kind.partition(".py")[0] in names("source"):
        return source_from(values)
    source: PromptSource = find("benchmark", kind).value.prompts_of(values)
    return source


class Decontaminate(Settings):
    """What prompts must not overlap with, and what happens to those that do."""

    against: list[
        Annotated[SerializeAsAny[PromptSource], BeforeValidator(_against, json_schema_input_type=str | dict[str, Any])]
    ] = Field(
        min_length=1,
        description="benchmarks by name (`mt_bench`, `alpaca_eval`, `ifeval`, one of `benchmarks.own`), or with their "
        "keys ({type: ifeval, prompts: my/ifeval.jsonl}); other test sets as entries of `prompts.sources` "
        "({type: jsonl, path: gsm8k.jsonl, column: question}). Default where the run has a block `benchmarks`: all of "
        "its benchmarks; a name is then that of its block",
    )
    action: Literal["drop", "warn"] = Field(
        "drop", description="drop: leave out what overlaps; warn: keep it. Both count it, in report and data card"
    )

    def digests(self) -> dict[str, str]:
        """Content digests of the benchmarks, for the fingerprint. Raises InputError where one cannot be found."""
        return digests_of(self._named())

    def _named(self) -> list[tuple[str, PromptSource]]:
        return [(f"against {name}", source) for name, source in named_sources(self.against)]

    def overlaps(self, digests: Mapping[str, str] | None = None) -> Overlaps:
        """The benchmarks, at the content of `digests()` where that can be chosen.

        Raises:
            InputError: a benchmark cannot be read, or has no text.
        """
        found = Overlaps(
            {name.removeprefix("against "): _texts(source) for name, source in pinned(self._named(), digests)}
        )
        if empty := [name for name, size in found.sizes.items() if not size]:
            raise InputError(f"prompts.decontaminate.against: {empty[0]} has no text; check its file and column")
        return found


def _texts(source: PromptSource) -> Iterable[str]:
    """All texts of a source, each message by itself."""
    for row in source.rows():
        values = [m["content"] for m in row.value] if isinstance(row.value, list) else [row.value or ""]
        yield from (text for text in values if text.strip())


# --- counting ---------------------------------------------------------------------------------------------------------


class Screen:
    """Holds the texts of one stage against the benchmarks and counts what overlaps."""

    def __init__(self, settings: Decontaminate | None, what: str, digests: Mapping[str, str] | None = None) -> None:
        """Args: `what` is counted, such as "prompts"; without settings nothing overlaps. Raises InputError."""
        self._what, self._action = what, settings and settings.action
        self._overlaps = None if settings is None else settings.overlaps(digests)
        self._checked = self._found = 0
        sizes = self._overlaps.sizes if self._overlaps else {}
        self._counts = {name: {"texts": size, "exact": 0, "overlapping": 0} for name, size in sizes.items()}

    def drops(self, *texts: str) -> bool:
        """Whether what has these texts is left out, because one of them overlaps."""
        if self._overlaps is None:
            return False
        self._checked += 1
        found: dict[str, bool] = {}
        for text in texts:
            for name, equal in self._overlaps.of(text).items():
                found[name] = equal or found.get(name, False)
        for name, equal in found.items():
            self._counts[name]["overlapping"] += 1
            self._counts[name]["exact"] += equal
        self._found += bool(found)
        return bool(found) and self._action == "drop"

    def facts(self) -> dict[str, Any]:
        """`{"contamination": …}` for the facts of the stage; empty without settings."""
        if self._overlaps is None:
            return {}
        return {
            CONTAMINATION: {
                "what": self._what,
                "action": self._action,
                "checked": self._checked,
                "overlapping": self._found,
                "benchmarks": self._counts,
            }
        }

    def warnings(self) -> list[str]:
        """One line where something that overlaps was kept."""
        if self._action != "warn" or not self._found:
            return []
        share = f"{self._found:,} of {self._checked:,} {self._what}"
        with_these = ", ".join(f"{name} ({n:,})" for name, one in self._counts.items() if (n := one["overlapping"]))
        return [f"{share} overlap with {with_these}; set prompts.decontaminate.action to drop to leave them out"]


#: Compares with nothing.
NOTHING = Screen(None, "")

#: Name of the fact.
CONTAMINATION = "contamination"


def contamination_of(facts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the screens of several stages found, from the facts of these stages."""
    return [one[CONTAMINATION] for one in facts if CONTAMINATION in one]


def contamination_lines(found: Sequence[Mapping[str, Any]], by_benchmark: bool = True) -> dict[str, str]:
    """Name and text of each figure: what overlaps in all, and with each benchmark."""
    lines: dict[str, str] = {}
    for one in found:
        done = "left out" if one["action"] == "drop" else "kept (action: warn)"
        lines[one["what"]] = f"{one['overlapping']:,} of {one['checked']:,} overlap with a benchmark; {done}"
        for name, counts in one["benchmarks"].items() if by_benchmark else ():
            lines[f"{one['what']} and {name} ({counts['texts']:,} texts)"] = (
                f"{counts['overlapping']:,} overlap, {counts['exact']:,} of them equal"
            )
    return lines
