"""The datasets as stages: training rows shard by shard, then one writer over the kept rows.

No LLM is called here, so a new limit or seed is applied to what is stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.card import Provenance
from ray_pipeline.data.confidence import panel_confidence
from ray_pipeline.data.convert import pairs_to_sft
from ray_pipeline.data.dataset_files import Keep, write_dataset_files
from ray_pipeline.data.dataset_rows import DatasetsConfig, dpo_rows, kto_rows
from ray_pipeline.data.decontamination import contamination_of
from ray_pipeline.data.early_exit import Scale
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.rows import add_counts, flat_counts
from ray_pipeline.data.sources import InputError
from ray_pipeline.data.tokens import counted_with, counter_identity, token_counter
from ray_pipeline.engines.models import ModelSettings, TokenizerSettings
from ray_pipeline.graph.asking import ShardTables
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage, StageStop, WholeInput, WholeWork

#: Role of a stage of training files of whose rows only the number is read.
_SIZE = "size/"


class Judged(NamedTuple):
    """Candidates with their verdicts and the decisions on them."""

    candidates: Stage
    verdicts: Sequence[Stage]
    decisions: Stage


class _RowsGiven(Settings):
    datasets: DatasetsConfig
    judges: tuple[str, ...]
    tokenizer: TokenizerSettings | None
    every_rejected: bool
    scale: Scale | None = None


class _FilesGiven(Settings):
    datasets: DatasetsConfig
    gate: GateConfig | None
    judges: tuple[str, ...]
    lineage: dict[str, str]
    origin: Provenance
    trained_on: bool
    max_prompts: int | None
    keep: Keep
    lengths: str


def dataset_rows(
    settings: DatasetsConfig,
    judges: Sequence[str],
    policy: ModelSettings | None,
    prompts: Stage,
    candidates: Stage,
    verdicts: Sequence[Stage],
    decisions: Stage,
    *,
    name: str = "dataset-rows",
    every_rejected: bool = False,
    scale: Scale | None = None,
    earlier: Sequence[Judged] = (),
) -> Stage:
    """Rows of every kind needed for the datasets, shard by shard, and the panel's confidence if rows are weighted.

    Args:
        policy: whose tokenizer counts the rows' tokens; None: they are estimated.
        every_rejected: a pair with each rejected candidate of a prompt, not with the worst alone.
        scale: of the judges' scores, where rows can be weighted.
        earlier: of rounds whose candidates are used, too, as if all had been drawn at once.

    Raises:
        InputError: rows are to be weighted, but there is no scale.
    """
    if settings.weights and scale is None:
        raise InputError("datasets.weights is only for dmapo and baselines, whose judges score candidates; remove it")
    scale = scale if settings.weights else None
    tables = (*settings.row_kinds, *(["confidence"] if scale else []))
    judged = [stage for one in earlier for stage in one.verdicts]
    return Stage(
        name=name,
        version=3,  # 2: equal answers to a prompt are one row; 3: pairs have `copies`
        group="datasets",
        role="rows",
        work=ShardWork(
            function=make_rows,
            tables=tables,
            settings=_RowsGiven(
                datasets=settings,
                judges=tuple(judges),
                tokenizer=None if policy is None else policy.tokenizer,
                every_rejected=every_rejected,
                scale=scale,
            ),
        ),
        config={
            **settings.decisive(exclude={"kinds", "seed", "rows_per_file"}),
            "tables": list(settings.row_kinds),
            "judges": list(judges),
            **({} if policy is None else {"chat_template_args": policy.chat_template_args}),
            **({"every_rejected": True} if every_rejected else {}),
            **({"scale": list(scale)} if scale else {}),
        },
        inputs={
            "prompts": prompts,
            "candidates": candidates,
            "decisions": decisions,
            **{f"candidates/{one.candidates.name}": one.candidates for one in earlier},
            **{f"decisions/{one.decisions.name}": one.decisions for one in earlier},
            **{f"verdicts/{stage.name}": stage for stage in (*verdicts, *judged)},
        },
        external=counter_identity(policy),
    )


def dataset_files(
    settings: DatasetsConfig,
    gate_settings: GateConfig | None,
    judges: Sequence[str],
    rows: Stage,
    policy: ModelSettings | None,
    *,
    name: str = "datasets",
    view: str = "datasets",
    origin: Provenance | None = None,
    trained_on: bool = True,
    max_prompts: int | None = None,
    keep: Keep = "random",
) -> Stage:
    """Training files of all kinds, in the order of `settings.seed`.

    Args:
        rows: the stage with a table of each of `settings.row_kinds`.
        policy: the model whose tokenizer counted the rows' tokens; None: they were estimated.
        origin: where the preferences come from, for the card; default: the judges' consensus.
        trained_on: whether the stage fails where it leaves nothing to train on.
        max_prompts: largest number of prompts in each training split; default: all.
        keep: which prompts these are.
    """
    lineage = {stage.name: stage.fingerprint for stage in [*rows.inputs.values(), rows]}
    origin = origin or Provenance()
    return Stage(
        name=name,
        group="datasets",
        role="datasets",
        view=view,
        version=2,  # 2: KTO weights without jumps
        work=WholeWork(
            function=write_files,
            settings=_FilesGiven(
                datasets=settings,
                gate=gate_settings,
                judges=tuple(judges),
                lineage=lineage,
                origin=origin,
                trained_on=trained_on,
                lengths=counted_with(policy),
                max_prompts=max_prompts,
                keep=keep,
            ),
        ),
        config={
            **settings.decisive(),
            "origin": origin.text or None,
            **({} if max_prompts is None else {"max_prompts": max_prompts}),
            **({} if keep == "random" else {"keep": keep}),
        },
        inputs={"rows": rows, **_screened(rows, origin)},
    )


def _screened(rows: Stage, origin: Provenance) -> dict[str, Stage]:
    """The stages before the rows that counted overlap with benchmarks, for the card."""
    if not (origin.config.get("prompts") or {}).get("decontaminate"):
        return {}
    roles = ["prompts", *(["candidates"] if origin.ready("candidates") else [])]
    return {f"screened/{role}": rows.inputs[role] for role in roles if role in rows.inputs}


def of_size(files: Stage, others: Iterable[Stage], name: str) -> Stage:
    """A stage of training files whose rows are cut at random to the size of the smallest of other such stages."""
    sizes = {f"{_SIZE}{stage.name}": stage for stage in others}
    return dataclasses.replace(files, name=name, inputs={**files.inputs, **sizes})


def cut_to_size(run: Run) -> list[str]:
    """Names of the stages of a run that `of_size` made."""
    return [name for name, stage in run.stages.items() if any(role.startswith(_SIZE) for role in stage.inputs)]


def make_rows(given: ShardInput) -> ShardOutput:
    settings: _RowsGiven = given.settings
    encode = token_counter(settings.tokenizer)
    shard = ShardTables(given.tables, given.facts)
    candidates, verdicts, decisions = (
        pa.concat_tables(shard.under(prefix)) for prefix in ("candidates", "verdicts/", "decisions")
    )
    arguments = (given.tables["prompts"], candidates, verdicts, decisions)
    tables: dict[str, pa.Table] = {}
    counts: dict[str, int] = {}
    for kind in settings.datasets.row_kinds:
        if kind == "kto":
            tables[kind], found = kto_rows(*arguments, settings.datasets, encode, settings.judges)
        else:
            tables[kind], found = dpo_rows(*arguments, settings.datasets, encode, settings.every_rejected)
        counts |= flat_counts(found, f"{kind}.")
    if settings.scale is not None:
        tables["confidence"] = panel_confidence(candidates, verdicts, settings.judges, settings.scale)
    given.tick(decisions.num_rows)
    return ShardOutput(tables, counts)


def _nested(counts: Mapping[str, int], kind: str) -> dict[str, Any]:
    """Undo `flat_counts` for one kind of dataset."""
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
        if kind == "sft" and "sft" not in rows.tables:  # imported rows may have a table of their own
            counts[kind] = add_counts([pairs_to_sft(pairs)[1] for pairs in rows.table("dpo").scan()])
            tables[kind] = (pairs_to_sft(pairs)[0] for pairs in rows.table("dpo").scan())
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
        max_prompts=settings.max_prompts,
        keep=settings.keep,
        confidence=rows.table("confidence").scan() if "confidence" in rows.tables else None,
        lengths=settings.lengths,
        contamination=contamination_of(result.facts for result in given.inputs.values()),
        sizes=[result.facts["rows"] for role, result in given.inputs.items() if role.startswith(_SIZE)],
    )
    given.log(", ".join(f"{kind} {split} {n}" for kind, sizes in stats["rows"].items() for split, n in sizes.items()))
    useless = untrainable(stats["rows"])
    if settings.trained_on and len(useless) == len(settings.datasets.kinds):
        raise StageStop(
            f"nothing to train on: {'; '.join(useless)}. "
            + (
                "`quorum report` shows labels and unread replies; change gate.tau, gate.desirable_at, "
                "gate.undesirable_at, the judges or the critic, then rerun the same command"
                if settings.judges
                else "Bring rows of both kinds, or lower prompts.val_fraction, then rerun the same command"
            )
        )
    guards = {f"{kind}: {why}": n for kind, found in counts.items() for why, n in found.get("dropped", {}).items()}
    guards |= {f"{kind}: repeated": n for kind, found in counts.items() if (n := found.get("repeated_responses"))}
    facts = {"rows": stats["rows"], "kto_weights": stats["kto_weights"], "dropped": guards, "counts": counts}
    facts["lengths"] = settings.lengths
    return facts | ({"warnings": useless} if useless else {})


def untrainable(rows: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Why there is nothing to train on, for each kind of dataset for which this is so.

    Args:
        rows: kind → rows of each split, as in `stats.json`.
    """
    found: list[str] = []
    for kind, sizes in rows.items():
        classes = [name for name in ("desirable", "undesirable") if kind == "kto" and not sizes[f"train_{name}"]]
        if classes or not sizes["train"]:
            found.append(f"{kind} has no {' and no '.join(classes) or 'training'} rows")
    return found
