"""Prompts, gate and data sets as stages of a DAG: their pure functions, given the tables of a run.

No stage here makes an LLM call, so a new threshold, limit or seed is answered from what is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_pipeline.graph.models import ModelSettings
from ray_pipeline.graph.stage import BadInput, ShardInput, ShardOutput, ShardWork, Stage, WholeInput, WholeWork
from ray_pipeline.stages.datasets import DatasetsConfig, TokenCounter, dpo_rows, kto_rows, write_dataset_files
from ray_pipeline.stages.gate import GateConfig, decide, label_counts
from ray_pipeline.stages.prompts import PromptsConfig, load_prompts, shard_prompts, source_digests
from ray_pipeline.stages.sources import InputError
from ray_pipeline.store.settings import Settings
from ray_pipeline.store.tables import ShardedTable

# --- prompts ----------------------------------------------------------------------------------------------------------


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
        config=settings.model_dump(mode="json"),
        external=digests,
    )


def make_prompts(given: WholeInput) -> dict[str, Any]:
    settings: _PromptsGiven = given.settings
    try:
        found = load_prompts(settings.prompts, settings.digests)
    except InputError as error:
        raise BadInput(str(error)) from error
    table = ShardedTable(given.folder.location, "prompts", given.num_shards, given.fingerprint)
    for shard, part in enumerate(shard_prompts(found.table, given.num_shards)):
        table.write(shard, part)
    given.log(f"{found.counts['kept']} kept of {found.counts['read']} read; dropped {found.counts['dropped']}")
    return {"counts": found.counts}


# --- gate -------------------------------------------------------------------------------------------------------------


class _GateGiven(Settings):
    gate: GateConfig
    judges: tuple[str, ...]


def gate(
    settings: GateConfig, judges: Sequence[str], candidates: Stage, verdicts: Sequence[Stage], critiques: Stage | None
) -> Stage:
    """One decision a candidate."""
    inputs = {"candidates": candidates, **_verdict_roles(verdicts)}
    if critiques is not None:
        inputs["critiques"] = critiques
    return Stage(
        name="gate",
        work=ShardWork(
            function=decide_shard, tables=("decisions",), settings=_GateGiven(gate=settings, judges=tuple(judges))
        ),
        config={"gate": settings.model_dump(mode="json"), "judges": list(judges)},
        inputs=inputs,
    )


def decide_shard(given: ShardInput) -> ShardOutput:
    settings: _GateGiven = given.settings
    table = decide(
        given.tables["candidates"],
        _verdicts(given.tables),
        given.tables.get("critiques"),
        settings.judges,
        settings.gate,
    )
    given.tick(table.num_rows)
    return ShardOutput({"decisions": table}, label_counts(table))


def _verdict_roles(stages: Sequence[Stage]) -> dict[str, Stage]:
    return {f"verdicts/{stage.name}": stage for stage in stages}


def _verdicts(tables: Mapping[str, pa.Table]) -> pa.Table:
    """The verdicts of all judge stages, by role name."""
    return pa.concat_tables([tables[role] for role in sorted(tables) if role.startswith("verdicts/")])


# --- data sets --------------------------------------------------------------------------------------------------------


class _RowsGiven(Settings):
    datasets: DatasetsConfig
    judges: tuple[str, ...]
    tokenizer: str
    revision: str | None


class _FilesGiven(Settings):
    datasets: DatasetsConfig
    gate: GateConfig
    judges: tuple[str, ...]
    lineage: dict[str, str]


def datasets(
    settings: DatasetsConfig,
    gate_settings: GateConfig,
    judges: Sequence[str],
    policy: ModelSettings,
    prompts: Stage,
    candidates: Stage,
    verdicts: Sequence[Stage],
    decisions: Stage,
) -> Stage:
    """Training files, in two steps: rows shard by shard, then one writer over the kept rows."""
    inputs = {"prompts": prompts, "candidates": candidates, "decisions": decisions, **_verdict_roles(verdicts)}
    rows = Stage(
        name="dataset-rows",
        group="datasets",
        work=ShardWork(
            function=make_rows,
            tables=tuple(settings.kinds),
            settings=_RowsGiven(
                datasets=settings, judges=tuple(judges), tokenizer=policy.model, revision=policy.revision
            ),
        ),
        config={**settings.model_dump(mode="json", exclude={"seed", "rows_per_file"}), "judges": list(judges)},
        inputs=inputs,
        external=policy.weights(),
    )
    lineage = {stage.name: stage.fingerprint for stage in [*inputs.values(), rows]}
    return Stage(
        name="datasets",
        view="datasets",
        work=WholeWork(
            function=write_files,
            settings=_FilesGiven(datasets=settings, gate=gate_settings, judges=tuple(judges), lineage=lineage),
        ),
        config=settings.model_dump(mode="json"),
        inputs={"rows": rows},
    )


@functools.cache
def _token_counter(tokenizer: str, revision: str | None) -> TokenCounter:
    return TokenCounter.load(tokenizer, revision)


def make_rows(given: ShardInput) -> ShardOutput:
    settings: _RowsGiven = given.settings
    encode = _token_counter(settings.tokenizer, settings.revision)
    verdicts = _verdicts(given.tables)
    arguments = (given.tables["prompts"], given.tables["candidates"], verdicts, given.tables["decisions"])
    tables: dict[str, pa.Table] = {}
    counts: dict[str, int] = {}
    for kind in settings.datasets.kinds:
        if kind == "kto":
            tables[kind], found = kto_rows(*arguments, settings.datasets, encode, settings.judges)
        else:
            tables[kind], found = dpo_rows(*arguments, settings.datasets, encode)
        counts |= _flat(found, f"{kind}.")
    given.tick(given.tables["decisions"].num_rows)
    return ShardOutput(tables, counts)


def _flat(counts: Mapping[str, Any], before: str) -> dict[str, int]:
    flat: dict[str, int] = {}
    for name, value in counts.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": int(value)}
    return flat


def _nested(counts: Mapping[str, int], kind: str) -> dict[str, Any]:
    """Undo `_flat` for one kind of data set."""
    nested: dict[str, Any] = {}
    for name, value in counts.items():
        first, *path = name.split(".")
        if first != kind:
            continue
        place = nested
        for step in path[:-1]:
            place = place.setdefault(step, {})
        place[path[-1]] = value
    return nested


def write_files(given: WholeInput) -> dict[str, Any]:
    settings: _FilesGiven = given.settings
    rows = given.inputs["rows"]
    counts: dict[str, dict[str, Any]] = {kind: _nested(rows.facts["counts"], kind) for kind in settings.datasets.kinds}
    stats = write_dataset_files(
        given.folder,
        {kind: rows.table(kind).scan() for kind in settings.datasets.kinds},
        settings.datasets,
        fingerprint=given.fingerprint,
        counts=counts,
        gate=settings.gate,
        judges=settings.judges,
        lineage=settings.lineage,
    )
    given.log(", ".join(f"{kind} {split} {n}" for kind, sizes in stats["rows"].items() for split, n in sizes.items()))
    guards = {f"{kind}: {why}": n for kind, found in counts.items() for why, n in found.get("dropped", {}).items()}
    return {"rows": stats["rows"], "kto_weights": stats["kto_weights"], "dropped": guards, "counts": counts}
