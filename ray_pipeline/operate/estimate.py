"""The calls that a workflow would make, by running its own stages on a sample of its inputs and on stand-in replies.

Prompts, items and questions are read for real. The stages that call a model, and columnar stages between them, then run
here with an engine that counts calls and tokens and replies with filler of the expected length. A call on a sampled
prompt counts for all prompts that it stands for. Training and what follows from real replies (gate, datasets, pages)
is left out; a trained policy is taken to reply as its base model does.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import inspect
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import Completion, Message, Sampling
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.graph.stage import BadInput, Dag, ShardInput, ShardWork, Stage, StageRef, StageResult, WholeInput
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import call_key, digest

#: Prompts of each split (questions of each benchmark) that are counted; more change a mean by less than rates are off.
_SAMPLE = 64
_WORD = "word "

Count = Callable[[Sequence[Message]], int]
"""Tokens of a chat."""


@dataclasses.dataclass
class Estimate:
    """Calls of one stage, with their tokens.

    Attributes:
        bound: tokens are an upper bound, because some replies are taken to be as long as max_tokens allows.
    """

    calls: float = 0.0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    bound: bool = False


@dataclasses.dataclass(frozen=True)
class Estimates:
    """What a run would do.

    Attributes:
        stages: by name, the stages that call a model, in the order of the workflow.
        candidates: by name, the stages that hold candidates: tokens of all their rows, prompt and response.
    """

    stages: dict[str, Estimate]
    candidates: dict[str, float]


def estimate(dag: Dag, count: Callable[[Stage], Count], reply: Callable[[Stage], float | None]) -> Estimates:
    """Run the workflow on stand-ins.

    Args:
        count: a stage that calls a model → counter with the model's tokenizer.
        reply: such a stage → mean completion tokens of its replies; None where unknown.

    Raises:
        ConfigError: the prompts, items or questions cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="quorum-plan-") as folder:
        run = _DryRun(folder)
        for stage in _needed(dag):
            run.make(stage, count, reply)
    return Estimates(run.estimates, run.candidates)


def calls_model(stage: Stage) -> bool:
    return isinstance(stage.work, ShardWork) and stage.work.engine is not None


def _needed(dag: Dag) -> list[Stage]:
    """Stages that call a model and what they read, without training and what it reads."""
    needed: list[Stage] = []

    def need(stage: Stage) -> None:
        if stage not in needed:
            for parent in stage.inputs.values():
                if parent.role_name != "policy":
                    need(parent)
            needed.append(stage)

    for stage in dag.stages:
        if calls_model(stage):
            need(stage)
    return needed


class _DryRun:
    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._results: dict[str, StageResult] = {}
        #: By stage and prompt_id, how many prompts a sampled one stands for.
        self._weights: dict[str, Mapping[str, float]] = {}
        #: Replies by model, prompt and call: an equal call of another stage is answered from the call log in a run.
        self._log: dict[str, Completion] = {}
        self.estimates: dict[str, Estimate] = {}
        self.candidates: dict[str, float] = {}

    def make(self, stage: Stage, count: Callable[[Stage], Count], reply: Callable[[Stage], float | None]) -> None:
        ref, work = StageRef.of(stage, self._folder, 1), stage.work
        inputs = {role: self._results[p.name] for role, p in stage.inputs.items() if p.name in self._results}
        weights = {prompt: n for result in inputs.values() for prompt, n in self._weights[result.name].items()}
        facts: Mapping[str, Any] = {}
        if isinstance(work, ShardWork):
            tables = {
                role if len(result.tables) == 1 else f"{role}.{kind}": result.table(kind).read(0)
                for role, result in inputs.items()
                for kind in result.tables
            }
            engine = None
            if calls_model(stage):
                bound = any(self.estimates[name].bound for name in self._ancestors(stage))
                estimate = self.estimates[stage.name] = Estimate(bound=bound)
                engine = _StandIns(stage, estimate, weights, count(stage), reply(stage), self._log)
            found = {role: result.facts for role, result in inputs.items()}
            given = ShardInput(0, 1, tables, found, engine, _asked_once(work.settings), _nothing, _nothing)
            made = work.function(given)
            output: Any = asyncio.run(made) if inspect.iscoroutine(made) else made
            for kind, table in output.tables.items():
                ref.table(kind).write(0, table)
        else:
            place, log = Folder(ref.folder), Folder(self._folder) / "calls"
            try:
                facts = work.function(
                    WholeInput(inputs, place, log, stage.fingerprint, 1, work.settings, _nothing, _nothing)
                )
            except BadInput as error:
                raise ConfigError(str(error)) from error
            if not inputs and ref.tables:
                weights = _cut(ref)
        self._results[stage.name] = StageResult(**vars(ref), rows={}, facts=facts)
        self._weights[stage.name] = weights
        if stage.role_name == "candidates" and ref.tables == ("candidates",):
            self.candidates[stage.name] = _row_tokens(ref.table().read(0), weights)

    def _ancestors(self, stage: Stage) -> set[str]:
        """Names of the estimated stages whose replies a stage reads."""
        found: set[str] = set()
        for parent in stage.inputs.values():
            if parent.role_name != "policy":
                found |= self._ancestors(parent) | ({parent.name} & set(self.estimates))
        return found


def _nothing(*given: Any) -> None:
    pass


def _asked_once(settings: Any) -> Any:
    """Settings under which every reply takes its form and none is asked for again."""
    if not isinstance(settings, Settings):
        return settings
    fields = type(settings).model_fields
    changes: dict[str, Any] = {name: value for name, value in (("grammar", True), ("retries", 0)) if name in fields}
    for name in fields:
        if isinstance(part := getattr(settings, name), Settings):
            changes[name] = _asked_once(part)
    return settings.model_copy(update=changes)


def _cut(source: StageRef) -> dict[str, float]:
    """Keep some prompts of every split or benchmark, spread evenly over their lengths; returns by prompt_id how many
    each stands for."""
    tables = {kind: source.table(kind).read(0) for kind in source.tables}
    first = next(iter(tables.values()))
    part = next((name for name in ("split", "benchmark") if name in first.column_names), "prompt_id")
    parts: dict[str, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in first.to_pylist():
        parts["" if part == "prompt_id" else row[part]][row["prompt_id"]].append(len(str(row)))
    weights: dict[str, float] = {}
    for lengths in parts.values():
        ordered = sorted(lengths, key=lambda prompt: (sum(lengths[prompt]), prompt))
        for n in range(_SAMPLE):
            alike = ordered[n * len(ordered) // _SAMPLE : (n + 1) * len(ordered) // _SAMPLE]
            if alike:
                kept = min(alike)  # of the smallest hash
                weights[kept] = sum(len(lengths[prompt]) for prompt in alike) / len(lengths[kept])
    for kind, table in tables.items():
        source.table(kind).write(0, table.filter(pc.is_in(table["prompt_id"], value_set=pa.array(list(weights)))))
    return weights


def _row_tokens(candidates: pa.Table, weights: Mapping[str, float]) -> float:
    """Tokens of prompt and response, summed over all rows. A revision's row has the prompt of the first response."""
    rows = sorted(candidates.to_pylist(), key=lambda row: row["k"], reverse=True)
    prompt: dict[str, int] = {row["prompt_id"]: row["prompt_tokens"] for row in rows}
    tokens = (weights[row["prompt_id"]] * (prompt[row["prompt_id"]] + row["completion_tokens"]) for row in rows)
    return float(sum(tokens))


class _StandIns(LoggedEngine):
    """Counts calls, and replies with filler in the form that a call asks for; no two replies are equal."""

    def __init__(
        self,
        stage: Stage,
        estimate: Estimate,
        weights: Mapping[str, float],
        count: Count,
        reply: float | None,
        log: dict[str, Completion],
    ) -> None:
        policy = stage.inputs.get("train")
        engine = stage.config.get("engine") if isinstance(stage.config, dict) else None
        self.identity = {"model": digest([dict(stage.external), engine, policy and policy.fingerprint])}
        self._estimate, self._weights, self._count, self._reply = estimate, weights, count, reply
        self._log = log
        empty, number, words = (self._tokens(text) for text in ("", f"{0:05d} ", 100 * _WORD))
        self._word, self._number = max((words - empty) / 100, 0.01), number - empty

    def _tokens(self, text: str) -> int:
        return self._count([{"role": "user", "content": text}])

    async def call(self, prompt_id: str, role: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        key = f"{prompt_id} {call_key(self.identity, messages, sampling.key())}"
        if key in self._log:
            return self._log[key]
        weight, prompt = self._weights[prompt_id], self._count(messages)
        tokens = min(float(sampling.max_tokens), self._reply or sampling.max_tokens)
        self._estimate.calls += weight
        self._estimate.prompt_tokens += weight * prompt
        self._estimate.completion_tokens += weight * tokens
        self._estimate.bound |= self._reply is None
        self._log[key] = Completion(self._text(sampling, tokens), "stop", prompt, round(tokens), 0)
        return self._log[key]

    def _text(self, sampling: Sampling, tokens: float) -> str:
        grammar = sampling.grammar
        if grammar is None or grammar.kind == "regex":
            return self._filler(tokens)
        if grammar.kind == "choice":
            return str(grammar.decoded()[0])
        fields: dict[str, Any] = grammar.decoded()["properties"]
        texts = sum(field.get("type") == "string" and "enum" not in field for field in fields.values())
        return json.dumps({name: self._value(field, tokens / max(texts, 1)) for name, field in fields.items()})

    def _value(self, field: Mapping[str, Any], tokens: float) -> Any:
        if "enum" in field:
            return field["enum"][0]
        if field.get("type") == "string":
            return self._filler(tokens)[: field.get("maxLength")]
        return True if field.get("type") == "boolean" else field.get("minimum", 0)

    def _filler(self, tokens: float) -> str:
        return f"{len(self._log):05d} {_WORD * round(max(tokens - self._number, 0) / self._word)}".rstrip()
