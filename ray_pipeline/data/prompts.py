"""The prompts stage: rows of all sources become one table of distinct prompts, each with its id and split.

The fate of a prompt depends on the prompt and the seed alone: the split is a hash, and a cap keeps the smallest hashes.
So another source, more rows or a higher cap add prompts and never reshuffle the existing ones.
"""

from __future__ import annotations

import collections
import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.decontamination import Decontaminate, Screen
from ray_pipeline.data.rows import add_counts, gather
from ray_pipeline.data.sources import (
    HuggingFaceSource,
    InputError,
    PromptSource,
    Source,
    SourceRow,
    digests_of,
    named_sources,
    pinned,
)
from ray_pipeline.data.sources.chats import BadRow, messages_of
from ray_pipeline.data.spill import Spill
from ray_pipeline.graph.stage import BadInput, Stage, WholeInput, WholeWork
from ray_pipeline.store.keys import (
    canonical_json,
    check_num_shards,
    normalise_text,
    prompt_id,
    unit_hash,
)
from ray_pipeline.store.outside import storable
from ray_pipeline.store.schemas import PROMPTS
from ray_pipeline.store.tables import ShardedTable

#: The source of a row, beside its columns until the prompts are chosen.
_SOURCE_NUMBER = pa.field("number", pa.int32(), nullable=False)

#: Malformed rows that are named, of each source; all are counted.
FAULTS_SHOWN = 20

#: Reasons for which a row of a source is not a prompt of the run, in the order in which they are applied. After
#: `duplicate` there is `contaminated`, counted where `prompts.decontaminate` is set.
DROPPED = ("malformed", "empty", "duplicate", "over_limit", "duplicate_across_sources", "over_max_prompts")


def _published_sources() -> list[Source]:
    return [
        HuggingFaceSource(name="openbmb/UltraFeedback", column="instruction", limit=10_000),
        HuggingFaceSource(name="nvidia/HelpSteer2", column="prompt", limit=5_000),
    ]


class PromptsConfig(Settings):
    """Sources of prompts and how many are kept."""

    sources: list[Source] = Field(
        default_factory=_published_sources,
        min_length=1,
        description="read in this order; a prompt that two of them hold counts for the first",
    )
    seed: int = Field(0, description="of the caps and the split")
    max_prompts: int | None = Field(
        None, ge=1, description="cap on the whole run; the prompts of the smallest hash(seed, prompt_id) are kept"
    )
    val_fraction: float = Field(0.05, ge=0, lt=1, description="expected share of held-out prompts")
    num_shards: int = Field(64, description="how many shards every later table has; divides 1,024")
    decontaminate: Decontaminate | None = Field(
        None,
        description="hold prompts, and answers that the user brings (`candidates.source`, `preferences`), against "
        "benchmarks: a shared run of 13 words, or equal word for word; default: nothing is compared",
        exclude_if=lambda block: block is None,
    )

    @field_validator("num_shards")
    @classmethod
    def _divides(cls, value: int) -> int:
        return check_num_shards(value)


def source_digests(config: PromptsConfig) -> dict[str, str]:
    """Content digest of every file, dataset and pocket set, for the fingerprint of the stage.

    Raises:
        InputError: a source cannot be found.
    """
    against = {} if config.decontaminate is None else config.decontaminate.digests()
    return digests_of(named_sources(config.sources)) | against


class ReadPrompts(NamedTuple):
    """What `read_prompts` did.

    Attributes:
        counts: `read`, `dropped` by reason, `kept`, `train`, `val`, and under `sources` for each source `read`,
            `dropped` by reason and `kept`; read = kept + the sum of dropped.
        faults: of malformed rows, with file and line; the first of each source.
        screen: what overlaps with benchmarks.
    """

    counts: dict[str, Any]
    faults: list[str]
    screen: Screen


def read_prompts(
    config: PromptsConfig,
    write: Callable[[int, pa.Table], object],
    num_shards: int,
    digests: Mapping[str, str] | None = None,
) -> ReadPrompts:
    """Read all sources, drop empty prompts, duplicates and those that overlap with a benchmark, and apply the caps.

    One shard is in memory, all ids, and the texts of the benchmarks.

    Args:
        write: is called with each shard and its table, in order; schema PROMPTS, sorted by prompt_id.
        digests: what `source_digests` returned; Hub datasets are then read at exactly those commits, even if there
            is a push in between. Without it, at the newest commit of their revision.

    Raises:
        InputError: a source is missing, empty or does not match its configuration, or no prompt is left.
    """
    source_of: dict[str, int] = {}
    by_source: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    splits: collections.Counter[str] = collections.Counter()
    screen = Screen(config.decontaminate, "prompts", digests)
    with Spill(PROMPTS.append(_SOURCE_NUMBER), num_shards) as spill:
        for number, (name, source) in enumerate(pinned(named_sources(config.sources), digests)):
            ids, counts = _read_source(source, config, faults, number, spill, screen)
            new = [prompt for prompt in ids if prompt not in source_of]
            source_of.update(dict.fromkeys(new, number))
            counts["dropped"]["duplicate_across_sources"] = len(ids) - len(new)
            by_source[name] = counts
        if not source_of:
            raise InputError(
                "all prompts overlap with a benchmark; set prompts.decontaminate.action to warn, or check "
                "prompts.decontaminate.against"
            )
        found = collections.Counter(source_of.values())
        kept = {prompt: source_of[prompt] for prompt in _smallest(source_of, config.max_prompts, config.seed)}
        of_source = collections.Counter(kept.values())
        for number, counts in enumerate(by_source.values()):
            counts["kept"] = of_source[number]
            counts["dropped"]["over_max_prompts"] = found[number] - of_source[number]
        for shard in range(num_shards):
            part = _of_shard(spill.read(shard), kept)
            splits.update(part["split"].to_pylist())
            write(shard, part)
    total = add_counts(list(by_source.values()))
    counts = {**total, "train": splits["train"], "val": splits["val"], "sources": by_source}
    return ReadPrompts(counts, faults, screen)


def _of_shard(table: pa.Table, kept: Mapping[str, int]) -> pa.Table:
    """The rows of the kept prompts that are of the right source, sorted by prompt_id."""
    rows = zip(table["prompt_id"].to_pylist(), table[_SOURCE_NUMBER.name].to_pylist(), strict=True)
    places = sorted((prompt, row) for row, (prompt, number) in enumerate(rows) if kept.get(prompt) == number)
    return gather(table.select(PROMPTS.names), np.array([row for _, row in places], dtype=np.int64))


def split_of(prompt: str, seed: int, val_fraction: float) -> str:
    """Split of a prompt, train or val; follows from the prompt and the seed alone."""
    return "val" if unit_hash("split", seed, prompt) < val_fraction else "train"


def _read_source(
    source: PromptSource, config: PromptsConfig, faults: list[str], number: int, spill: Spill, screen: Screen
) -> tuple[list[str], dict[str, Any]]:
    """Ids of the distinct prompts of one source, cut to its limit, and its counts; its first faults join `faults`."""
    counts: dict[str, Any] = {"read": 0, "dropped": dict.fromkeys(DROPPED, 0), "kept": 0}
    seen: dict[str, bool] = {}  # whether it is kept
    own: list[str] = []
    for row in source.rows():
        counts["read"] += 1
        try:
            messages = _conversation(row)
        except BadRow as fault:
            counts["dropped"]["malformed"] += 1
            if len(own) < FAULTS_SHOWN:
                own.append(str(fault))
            continue
        if messages is None:
            counts["dropped"]["empty"] += 1
            continue
        prompt = prompt_id(messages)
        if prompt in seen:
            counts["dropped"]["duplicate"] += 1
            continue
        seen[prompt] = not screen.drops(*(message["content"] for message in messages))
        if not seen[prompt]:
            counts["dropped"]["contaminated"] = counts["dropped"].get("contaminated", 0) + 1
            continue
        spill.add(
            {
                "prompt_id": prompt,
                "messages": messages,
                "source": row.source or source.label_in_tables,
                "task_type": row.task_type or "general",
                "split": split_of(prompt, config.seed, config.val_fraction),
                "meta": canonical_json(row.place),
                _SOURCE_NUMBER.name: number,
            }
        )
    where = getattr(source, "path", source.label_in_tables)
    if not counts["read"]:
        raise InputError(f"{where} has no rows; check that it was written, or remove it from prompts.sources")
    if not seen:
        column = getattr(source, "column", "prompt")
        if own:
            bad = counts["dropped"]["malformed"]
            raise InputError(f"{where}: {bad} of {counts['read']} rows are malformed, the others empty. {own[0]}")
        raise InputError(f"{where}: all {counts['read']} rows of column {column!r} are empty; choose another column")
    faults += own
    kept = [prompt for prompt, clean in seen.items() if clean]
    ids = _smallest(kept, source.cap, config.seed)
    counts["dropped"]["over_limit"] = len(kept) - len(ids)
    return ids, counts


def _conversation(row: SourceRow) -> list[dict[str, str]] | None:
    """Messages that end with a user turn, their texts as they stood; None when that turn holds nothing.

    Raises:
        BadRow: the row has a fault, or its messages do.
    """
    if row.fault:
        raise BadRow(row.fault)
    if isinstance(row.value, list):
        try:
            messages = messages_of(row.value)
        except BadRow as fault:
            raise BadRow(f"{canonical_json(row.place)}: {fault}") from fault
    else:
        messages = [{"role": "user", "content": storable(row.value or "")}]
    if not messages or not normalise_text(messages[-1]["content"]):
        return None
    if row.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": storable(row.system)})
    return messages


def _smallest(ids: Collection[str], limit: int | None, seed: int) -> list[str]:
    """The `limit` prompts with the smallest hash(seed, prompt_id)."""
    if limit is None or len(ids) <= limit:
        return list(ids)
    return heapq.nsmallest(limit, ids, key=lambda prompt: (unit_hash(seed, prompt), prompt))


# --- stage ------------------------------------------------------------------------------------------------------------


class _PromptsGiven(Settings):
    prompts: PromptsConfig
    digests: dict[str, str]


def prompts(settings: PromptsConfig) -> Stage:
    """The table of distinct prompts. Raises InputError when a source cannot be found."""
    digests = source_digests(settings)
    return Stage(
        name="prompts",
        work=WholeWork(
            function=make_prompts, settings=_PromptsGiven(prompts=settings, digests=digests), tables=("prompts",)
        ),
        config=settings.decisive(),
        external=digests,
    )


def make_prompts(given: WholeInput) -> dict[str, Any]:
    settings: _PromptsGiven = given.settings
    table = ShardedTable(given.folder.location, "prompts", given.num_shards, given.fingerprint)
    try:
        counts, faults, screen = read_prompts(settings.prompts, table.write, given.num_shards, settings.digests)
    except InputError as error:
        raise BadInput(str(error)) from error
    given.log(kept_line(counts))
    return {
        "counts": counts,
        "warnings": malformed_rows(given.log, counts, faults) + screen.warnings(),
        **screen.facts(),
    }


def kept_line(counts: Mapping[str, Any]) -> str:
    """How many rows of a source were kept, and why the others were not, in words."""
    dropped = ", ".join(f"{rows:,} {reason.replace('_', ' ')}" for reason, rows in counts["dropped"].items() if rows)
    return f"{counts['kept']:,} kept of {counts['read']:,} read" + (f"; dropped: {dropped}" if dropped else "")


def malformed_rows(log: Callable[[str], None], counts: Mapping[str, Any], faults: Sequence[str]) -> list[str]:
    """Log the first malformed rows of a source. The warning for the last lines of the run, if there are any."""
    for fault in faults:
        log(f"dropped as malformed: {fault}")
    bad, read = counts["dropped"]["malformed"], counts["read"]
    return [f"dropped {bad:,} malformed of {read:,} rows (the log names {len(faults)}): {faults[0]}"] if bad else []
