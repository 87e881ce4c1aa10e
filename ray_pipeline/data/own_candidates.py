"""Candidates that the user has already, as the table that generation would have written."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.candidate_sources import CandidateSource, OwnRow, label_of, own_rows
from ray_pipeline.data.decontamination import Decontaminate, Screen
from ray_pipeline.data.rows import gather
from ray_pipeline.data.sources import InputError
from ray_pipeline.data.spill import Spill
from ray_pipeline.graph.stage import BadInput, Stage, WholeInput, WholeWork
from ray_pipeline.store.keys import digest, prompt_id
from ray_pipeline.store.outside import storable
from ray_pipeline.store.schemas import CANDIDATES, to_table
from ray_pipeline.store.tables import ShardedTable

#: `seed` of these rows: nothing was sampled.
_NO_SEED = -1


class _Given(Settings):
    source: CandidateSource
    digests: dict[str, str]
    decontaminate: Decontaminate | None


def own_candidates(source: CandidateSource, prompts: Stage, decontaminate: Decontaminate | None = None) -> Stage:
    """The answers of the source's rows, ordered by prompt and place in the source.

    Args:
        prompts: the prompts of the same rows (`CandidatePrompts`). A prompt that it does not hold (over a limit) takes
            its candidates with it.
        decontaminate: of the prompts; the answers are held against the same benchmarks.
    """
    return Stage(
        name="candidates",
        # The prompts' fingerprint holds the digests of the same files and benchmarks.
        work=WholeWork(
            function=import_candidates,
            settings=_Given(source=source, digests=dict(prompts.external), decontaminate=decontaminate),
            tables=("candidates",),
        ),
        config=source.decisive(),
        inputs={"prompts": prompts},
    )


def import_candidates(given: WholeInput) -> dict[str, Any]:
    settings: _Given = given.settings
    known = {
        name for part in given.inputs["prompts"].table().scan(["prompt_id"]) for name in part["prompt_id"].to_pylist()
    }
    counts = dict.fromkeys(("rows", "malformed_rows", "answers", "kept", "empty", "of_no_prompt"), 0)
    ends = collections.Counter[str]()
    out = ShardedTable(given.folder.location, "candidates", given.num_shards, given.fingerprint)
    with Spill(_SPILLED, given.num_shards) as spill:
        try:
            screen = Screen(settings.decontaminate, "answers", settings.digests)
            for row in _answers(_kept(settings, known, counts, screen), label_of(settings.source)):
                spill.add(row)
                ends[row["finish_reason"]] += 1
        except InputError as error:
            raise BadInput(str(error)) from error
        for shard in range(given.num_shards):
            out.write(shard, _numbered(_by_prompt(spill.read(shard))))
    given.log(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()))
    return {"counts": dict(ends), "source": counts, "warnings": screen.warnings(), **screen.facts()}


def _kept(settings: _Given, known: set[str], counts: dict[str, int], screen: Screen) -> Iterator[tuple[str, OwnRow]]:
    """Prompt id and row of every row whose prompt is in the run, with the answers that are kept."""
    for row in own_rows(settings.source, settings.digests):
        counts["rows"] += 1
        counts["malformed_rows"] += row.fault is not None
        counts["answers"] += len(row.answers) + row.empty + row.unfinished
        counts["empty"] += row.empty
        for name, count in (
            ("unfinished_thought", row.unfinished),
            ("thoughts", sum(answer.thoughts is not None for answer in row.answers)),
        ):
            if count:  # as for imported preferences: few sources have any
                counts[name] = counts.get(name, 0) + count
        if not row.answers:
            continue
        name = prompt_id(row.messages)
        if name in known:
            clean = [answer for answer in row.answers if not screen.drops(answer.text)]
            if len(clean) < len(row.answers):
                counts["contaminated"] = counts.get("contaminated", 0) + len(row.answers) - len(clean)
            counts["kept"] += len(clean)
            yield name, dataclasses.replace(row, answers=clean)
        else:
            counts["of_no_prompt"] += len(row.answers)


_SPILLED = pa.schema(
    [
        (name, pa.string())
        for name in ("prompt_id", "response", "generator", "model", "source_label", "finish_reason", "thoughts")
    ]
)


def _answers(rows: Iterator[tuple[str, OwnRow]], otherwise: str) -> Iterator[dict[str, Any]]:
    """A row of _SPILLED for each answer; `otherwise` is the generator of one whose model is not known."""
    for name, row in rows:
        for answer in row.answers:
            yield {
                "prompt_id": name,
                "response": storable(answer.text),
                "generator": answer.model or otherwise,
                "model": answer.model,
                "source_label": answer.label,
                "finish_reason": storable(answer.finish_reason),
                "thoughts": None if answer.thoughts is None else storable(answer.thoughts),
            }


def _by_prompt(table: pa.Table) -> pa.Table:
    """The rows by prompt and place in the source."""
    names = np.array(table["prompt_id"].to_pylist(), dtype=object)
    return gather(table, np.argsort(names, kind="stable"))


def _numbered(rows: pa.Table) -> pa.Table:
    """The rows with their numbers and ids. An id is that of the content: prompt, model and text, and of equal ones the
    number."""
    numbers, equal = collections.Counter[str](), collections.Counter[str]()
    found = []
    for row in rows.to_pylist():
        content = digest(["own", row["prompt_id"], row["model"], row["response"]])
        name = content if not equal[content] else digest(["own", content, equal[content]])
        k = numbers[row["prompt_id"]]
        found.append({**row, "candidate_id": name, "k": k, "seed": _NO_SEED})
        equal[content] += 1
        numbers[row["prompt_id"]] += 1
    return to_table(found, CANDIDATES)
