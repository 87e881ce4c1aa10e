"""A run from prompts to dataset files by the real stages, on engines that answer from a script.

Everything that decides the tables is fixed: the pocket prompts, the script, and the engines' identities. There is no
Ray and no model; only the policy's tokenizer, which ships with the package, is loaded.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ray_pipeline.engines.base import Message, Sampling
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.shards import tables_by_role
from ray_pipeline.graph.stage import ShardInput, ShardWork, Stage, StageResult
from ray_pipeline.store.files import Folder
from tests.operate.planted_run import SHARDS, planted_dag
from tests.scripted import Reply, Script, ScriptedEngine, said

STAGES = ("prompts", "candidates", "judge", "critic", "gate", "dataset-rows", "datasets")
OVERRIDES = ("prompts.sources.0.count=48", "datasets.kinds=[kto,dpo,sft]", "datasets.rows_per_file=20")
#: An answer longer than `datasets.max_length` tokens.
_LONG = " ".join(["and"] * 150)


@dataclasses.dataclass
class ScriptedRun:
    """Where the run is, its stages by name, and what each of them came to."""

    folder: Path
    calls: Path
    stages: dict[str, Stage]
    results: dict[str, StageResult]


def scripted_run(folder: Path) -> ScriptedRun:
    """Make the run in an empty folder."""
    dag, _ = planted_dag(folder, *OVERRIDES)
    stages = {stage.name: stage for stage in dag.stages}
    results: dict[str, StageResult] = {}
    session = Session(str(folder), str(folder / "calls"), SHARDS)
    for name in STAGES:
        stage = stages[name]
        if isinstance(stage.work, ShardWork) and stage.work.engine is not None:
            results[name] = asyncio.run(ask(stage, stage.work, session, results))
        else:
            make_here([stage], session, results, lambda line: None)
    return ScriptedRun(folder, folder / "calls", stages, results)


async def ask(
    stage: Stage, work: ShardWork, session: Session, results: dict[str, StageResult], replies: Script | None = None
) -> StageResult:
    """Make an LLM stage shard by shard, with a script in place of its engine; default: `script`."""
    task = session.task(stage).reading(results)
    inputs, facts = tables_by_role(task), task.facts
    model = "scripted-policy" if stage.name == "candidates" else "scripted-judge"
    engine = ScriptedEngine(replies or script, identity={"engine": "scripted", "model": model})
    counts: dict[str, int] = {}
    for shard in range(SHARDS):
        tables = {role: table.read(shard) for role, table in inputs.items()}
        async with LoggedEngine(engine, Folder(session.calls_root), shard, SHARDS) as log:
            given = ShardInput(shard, SHARDS, tables, facts, log, work.settings, lambda rows: None, lambda *_: None)
            output = await work.function(given)  # type: ignore[misc]
        for kind, table in output.tables.items():
            task.ref.table(kind).write(shard, table)
        for key, number in output.counts.items():
            counts[key] = counts.get(key, 0) + number
    return StageResult(**vars(task.ref), rows={}, facts={"counts": dict(sorted(counts.items()))})


def script(messages: list[Message], sampling: Sampling) -> Reply:
    """A reply that follows from the call: an answer, a score, or a critique, some of them unreadable."""
    chat = [(m["role"], m["content"]) for m in messages]
    number = _number(repr((chat, sampling.key())))
    if sampling.grammar is None:
        return _answer(number)
    # Whatever it is sampled with, so that no retry helps.
    if _number(repr(chat)) % 29 == 0:
        return said("no JSON here")
    fields = json.loads(sampling.grammar.value)["properties"]
    if "score" in fields:
        # The judges of one answer mostly agree, so most of the score follows from the answer alone.
        level = (2, 4, 8, 9)[_number(messages[-1]["content"].rsplit("judge", 1)[0]) % 4]
        reply: dict[str, Any] = {"reason": f"because {number % 97}", "score": 1 if number % 17 == 0 else level}
        reply["score"] += number % 2
    else:
        flawed = number % 4 == 0
        reply = {"reason": "für « é »", "flawed": flawed, "failure_type": "circular" if flawed else "none"}
    return said(json.dumps({name: reply[name] for name in fields}, ensure_ascii=False))


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _answer(number: int) -> Reply:
    if number % 31 == 0:
        return said("")
    if number % 23 == 0:
        return said(_LONG, finish_reason="length")
    return said(f"the answer is {number % 7} — ok")
