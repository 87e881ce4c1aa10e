"""Prompts, gate and data sets as stages of a DAG: their pure functions, given the tables of a run.

No stage here makes an LLM call, so a new threshold, limit or seed is answered from what is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.convert import pairs_to_sft
from ray_pipeline.data.datasets import DatasetsConfig, TokenCounter, dpo_rows, kto_rows, write_dataset_files
from ray_pipeline.data.gate import GateConfig, decide, label_counts
from ray_pipeline.data.prompts import PromptsConfig, load_prompts, shard_prompts, source_digests
from ray_pipeline.data.rows import add_counts, one_array
from ray_pipeline.data.sources import InputError
from ray_pipeline.data.ungated import best_and_worst
from ray_pipeline.engines.models import ModelSettings, TokenizerSettings
from ray_pipeline.graph.stage import BadInput, ShardInput, ShardOutput, ShardWork, Stage, WholeInput, WholeWork
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
        config=settings.decisive(),
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
    gate: GateConfig | None
    judges: tuple[str, ...]
    first: int | None


def gate(
    settings: GateConfig | None,
    judges: Sequence[str],
    candidates: Stage,
    verdicts: Sequence[Stage],
    critiques: Stage | None,
    *,
    name: str = "gate",
    first: int | None = None,
) -> Stage:
    """One decision a candidate.

    Args:
        settings: None: no gate, best and worst of k instead.
        first: only the first so many candidates of each prompt.
    """
    inputs = {"candidates": candidates, **_verdict_roles(verdicts)}
    if critiques is not None and settings is not None and settings.use_critic:
        inputs["critiques"] = critiques
    given = _GateGiven(gate=settings, judges=tuple(judges), first=first)
    return Stage(
        name=name,
        group="gate",
        work=ShardWork(function=decide_shard, tables=("decisions",), settings=given),
        config=given.decisive(),
        inputs=inputs,
    )


def decide_shard(given: ShardInput) -> ShardOutput:
    settings: _GateGiven = given.settings
    candidates, others = given.tables["candidates"], [_verdicts(given.tables), given.tables.get("critiques")]
    if settings.first is not None:
        candidates = candidates.filter(pc.field("k") < settings.first)
        of_them = pc.is_in(pc.field("candidate_id"), value_set=one_array(candidates["candidate_id"]))
        others = [None if table is None else table.filter(of_them) for table in others]
    verdicts, critiques = others
    assert verdicts is not None
    if settings.gate is None:
        table = best_and_worst(candidates, verdicts, settings.judges)
    else:
        table = decide(candidates, verdicts, critiques, settings.judges, settings.gate)
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
    tokenizer: TokenizerSettings
    every_rejected: bool


class _FilesGiven(Settings):
    datasets: DatasetsConfig
    gate: GateConfig | None
    judges: tuple[str, ...]
    lineage: dict[str, str]
    origin: str | None


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
    rows = dataset_rows(settings, judges, policy, prompts, candidates, verdicts, decisions)
    return dataset_files(settings, gate_settings, judges, rows)


def dataset_rows(
    settings: DatasetsConfig,
    judges: Sequence[str],
    policy: ModelSettings,
    prompts: Stage,
    candidates: Stage,
    verdicts: Sequence[Stage],
    decisions: Stage,
    *,
    name: str = "dataset-rows",
    every_rejected: bool = False,
) -> Stage:
    """Rows of every kind that the data sets are made from, shard by shard.

    Args:
        every_rejected: a pair with each rejected candidate of a prompt, not with the worst alone.
    """
    return Stage(
        name=name,
        group="datasets",
        role="rows",
        work=ShardWork(
            function=make_rows,
            tables=settings.row_kinds,
            settings=_RowsGiven(
                datasets=settings,
                judges=tuple(judges),
                tokenizer=policy.tokenizer,
                every_rejected=every_rejected,
            ),
        ),
        config={
            **settings.decisive(exclude={"kinds", "seed", "rows_per_file"}),
            "tables": list(settings.row_kinds),
            "judges": list(judges),
            "chat_template_args": policy.chat_template_args,
            **({"every_rejected": True} if every_rejected else {}),
        },
        inputs={"prompts": prompts, "candidates": candidates, "decisions": decisions, **_verdict_roles(verdicts)},
        external=policy.weights(),
    )


def dataset_files(
    settings: DatasetsConfig,
    gate_settings: GateConfig | None,
    judges: Sequence[str],
    rows: Stage,
    *,
    name: str = "datasets",
    view: str = "datasets",
    origin: str | None = None,
) -> Stage:
    """Training files of all kinds, in the order of `settings.seed`.

    Args:
        rows: the stage with a table of each of `settings.row_kinds`.
        origin: how the preferences came about, for the data set cards; by default the judges' consensus.
    """
    lineage = {stage.name: stage.fingerprint for stage in [*rows.inputs.values(), rows]}
    return Stage(
        name=name,
        group="datasets",
        role="datasets",
        view=view,
        work=WholeWork(
            function=write_files,
            settings=_FilesGiven(
                datasets=settings, gate=gate_settings, judges=tuple(judges), lineage=lineage, origin=origin
            ),
        ),
        config={**settings.decisive(), "origin": origin},
        inputs={"rows": rows},
    )


def token_counter(tokenizer: TokenizerSettings) -> TokenCounter:
    """Loaded once a process."""
    return _token_counter(tokenizer.model_dump_json())


@functools.cache
def _token_counter(tokenizer: str) -> TokenCounter:
    return TokenCounter.load(TokenizerSettings.model_validate_json(tokenizer))


def make_rows(given: ShardInput) -> ShardOutput:
    settings: _RowsGiven = given.settings
    encode = token_counter(settings.tokenizer)
    verdicts = _verdicts(given.tables)
    arguments = (given.tables["prompts"], given.tables["candidates"], verdicts, given.tables["decisions"])
    tables: dict[str, pa.Table] = {}
    counts: dict[str, int] = {}
    for kind in settings.datasets.row_kinds:
        if kind == "kto":
            tables[kind], found = kto_rows(*arguments, settings.datasets, encode, settings.judges)
        else:
            tables[kind], found = dpo_rows(*arguments, settings.datasets, encode, settings.every_rejected)
        counts |= flat_counts(found, f"{kind}.")
    given.tick(given.tables["decisions"].num_rows)
    return ShardOutput(tables, counts)


def flat_counts(counts: Mapping[str, Any], before: str) -> dict[str, int]:
    flat: dict[str, int] = {}
    for name, value in counts.items():
        flat |= (
            flat_counts(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": int(value)}
        )
    return flat


def _nested(counts: Mapping[str, int], kind: str) -> dict[str, Any]:
    """Undo `flat_counts` for one kind of data set."""
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
    tables: dict[str, Iterable[pa.Table]] = {}
    counts: dict[str, dict[str, Any]] = {}
    for kind in settings.datasets.kinds:
        if kind == "sft":
            made = [pairs_to_sft(pairs) for pairs in rows.table("dpo").scan()]
            tables[kind], counts[kind] = [table for table, _ in made], add_counts([found for _, found in made])
        else:
            tables[kind], counts[kind] = rows.table(kind).scan(), _nested(rows.facts["counts"], kind)
    stats = write_dataset_files(
        given.folder,
        tables,
        settings.datasets,
        fingerprint=given.fingerprint,
        counts=counts,
        gate=settings.gate,
        judges=settings.judges,
        lineage=settings.lineage,
        origin=settings.origin,
    )
    given.log(", ".join(f"{kind} {split} {n}" for kind, sizes in stats["rows"].items() for split, n in sizes.items()))
    guards = {f"{kind}: {why}": n for kind, found in counts.items() for why, n in found.get("dropped", {}).items()}
    return {"rows": stats["rows"], "kto_weights": stats["kto_weights"], "dropped": guards, "counts": counts}
