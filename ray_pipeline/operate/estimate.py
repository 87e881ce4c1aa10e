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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import Completion, Message, Sampling
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.graph.stage import BadInput, Dag, ShardInput, ShardWork, Stage, StageRef, StageResult, WholeInput
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import call_key, canonical_json, digest
from ray_pipeline.training.spec import POLICIES

#: Prompts of each split (questions of each benchmark) that are counted; more change a mean by less than rates are off.
_SAMPLE = 64
_WORD = "word "
#: Share of max_tokens that a reply of unknown length takes in the prompts of later stages. Few replies are as long as
#: they may be: prompts of judges planned from the longest would be far too long.
EXPECTED_SHARE = 0.5

Count = Callable[[Sequence[Message]], int]
"""Tokens of a chat."""

Form = tuple[tuple[str, ...], Sampling]
"""What a server may refuse about a call, whatever its texts: the roles of its messages, and its sampling."""


@dataclasses.dataclass
class Estimate:
    """Calls of one stage, with their tokens.

    Attributes:
        bound: completion tokens are an upper bound, because some replies are taken to be as long as max_tokens allows.
        forms: of its calls, each once, in the order in which they came.
    """

    calls: float = 0.0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    bound: bool = False
    forms: dict[str, Form] = dataclasses.field(default_factory=dict)


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
        run = StandIns(folder, count, reply)
        for stage in needed(filter(calls_model, dag.stages)):
            run.make(stage)
    return Estimates(run.estimates, run.candidates)


def calls_model(stage: Stage) -> bool:
    return isinstance(stage.work, ShardWork) and stage.work.engine is not None


def needed(stages: Iterable[Stage]) -> list[Stage]:
    """Some stages and what they read, without training and what it reads."""
    found: list[Stage] = []

    def need(stage: Stage) -> None:
        if stage not in found:
            for parent in stage.inputs.values():
                if parent.role_name not in POLICIES:
                    need(parent)
            found.append(stage)

    for stage in stages:
        need(stage)
    return found


class StandIns:
    """Makes stages in a folder of its own, parents first, with stand-in replies.

    Args:
        count, reply: see `estimate`.
        sample: prompts of each split (questions of each benchmark) that are kept.
    """

    def __init__(
        self,
        folder: str,
        count: Callable[[Stage], Count],
        reply: Callable[[Stage], float | None],
        sample: int = _SAMPLE,
    ) -> None:
        self._folder, self._count, self._reply, self._sample = folder, count, reply, sample
        self._results: dict[str, StageResult] = {}
        #: By stage and prompt_id, how many prompts a sampled one stands for.
        self._weights: dict[str, Mapping[str, float]] = {}
        #: Replies by model, prompt and call: an equal call of another stage is answered from the call log in a run.
        self._log: dict[str, Completion] = {}
        self.estimates: dict[str, Estimate] = {}
        self.candidates: dict[str, float] = {}
        #: Stage that reads the user's prompts → split → prompts of all lengths. Of stored rows there are none.
        self.lengths: dict[str, dict[str, list[Sequence[Message]]]] = {}

    def __contains__(self, stage: Stage) -> bool:
        return stage.name in self._results

    def prompts(self, stage: Stage) -> float:
        """Prompts (or questions) that the stage's rows belong to, before sampling."""
        return sum(self._weights[stage.name].values())

    def most_rows(self, stage: Stage) -> int:
        """Largest number of rows that one prompt has in a stage."""
        names = self._results[stage.name].table().read(0)["prompt_id"]
        return max(collections.Counter(names.to_pylist()).values(), default=0)

    def take(self, stage: Stage, result: StageResult) -> None:
        """Use the stored rows of a stage that reads no other: those of its first shard with any."""
        ref = StageRef.of(stage, self._folder, 1)
        for shard in range(result.num_shards):
            tables = {kind: result.table(kind).read(shard) for kind in result.tables}
            if any(table.num_rows for table in tables.values()):
                break
        for kind, table in tables.items():
            ref.table(kind).write(0, table)
        self._put(stage, ref, result.facts, _cut(ref, self._sample) if ref.tables else {})

    def make(self, stage: Stage) -> None:
        """Make a stage. Raises ConfigError for rows of the user's that cannot be read."""
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
                estimate = self.estimates[stage.name] = Estimate()
                engine = _StandInEngine(stage, estimate, weights, self._count(stage), self._reply(stage), self._log)
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
                if ref.tables == ("prompts",):
                    self.lengths[stage.name] = _spread(ref.table().read(0))
                weights = _cut(ref, self._sample)
        self._put(stage, ref, facts, weights)

    def _put(self, stage: Stage, ref: StageRef, facts: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        self._results[stage.name] = StageResult(**vars(ref), rows={}, facts=facts)
        self._weights[stage.name] = weights
        if stage.role_name == "candidates" and ref.tables == ("candidates",):
            self.candidates[stage.name] = _row_tokens(ref.table().read(0), weights, self._prompt_tokens(stage))

    def _prompt_tokens(self, stage: Stage) -> dict[str, int]:
        """Tokens of the prompts that a stage reads, of four characters each."""
        prompts = stage.inputs.get("prompts")
        rows = [] if prompts is None else self._results[prompts.name].table().read(0).to_pylist()
        return {row["prompt_id"]: sum(len(turn["content"]) for turn in row["messages"]) // 4 for row in rows}


def _nothing(*given: Any) -> None:
    pass


def _asked_once(settings: Any) -> Any:
    """Settings under which every reply takes its form, none is asked for again, and none is skipped."""
    if not isinstance(settings, Settings):
        return settings
    fields = type(settings).model_fields
    settled = (("grammar", True), ("retries", 0), ("exit_rule", None))
    changes: dict[str, Any] = {name: value for name, value in settled if name in fields}
    for name in fields:
        if name not in changes and isinstance(part := getattr(settings, name), Settings):
            changes[name] = _asked_once(part)
    return settings.model_copy(update=changes)


def _has_free_replies(settings: Any) -> bool:
    """Whether a key `grammar` is off, which `_asked_once` turns on."""
    if not isinstance(settings, Settings):
        return False
    parts = [(name, getattr(settings, name)) for name in type(settings).model_fields]
    return any((name == "grammar" and value is False) or _has_free_replies(value) for name, value in parts)


def _cut(source: StageRef, sample: int) -> dict[str, float]:
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
        for n in range(sample):
            alike = ordered[n * len(ordered) // sample : (n + 1) * len(ordered) // sample]
            if alike:
                kept = min(alike)  # of the smallest hash
                weights[kept] = sum(len(lengths[prompt]) for prompt in alike) / len(lengths[kept])
    for kind, table in tables.items():
        source.table(kind).write(0, table.filter(pc.is_in(table["prompt_id"], value_set=pa.array(list(weights)))))
    return weights


def _spread(prompts: pa.Table) -> dict[str, list[Sequence[Message]]]:
    """Up to `_SAMPLE` prompts of every split, spread evenly over their lengths."""
    found: dict[str, list[Sequence[Message]]] = collections.defaultdict(list)
    for row in prompts.select(["split", "messages"]).to_pylist():
        found[row["split"]].append(row["messages"])
    for split, chats in found.items():
        chats.sort(key=lambda chat: sum(len(turn["content"]) for turn in chat))
        found[split] = [chats[n * len(chats) // _SAMPLE] for n in range(_SAMPLE)] if len(chats) > _SAMPLE else chats
    return dict(found)


def _row_tokens(candidates: pa.Table, weights: Mapping[str, float], prompts: Mapping[str, int]) -> float:
    """Tokens of prompt and response, summed over all rows. A revision's row has the prompt of the first response.

    Args:
        prompts: tokens of a prompt whose rows have none: no model has read it. Its responses are counted alike.
    """
    rows = sorted(candidates.to_pylist(), key=lambda row: row["k"], reverse=True)
    prompt = {row["prompt_id"]: row["prompt_tokens"] for row in rows}
    total = 0.0
    for row in rows:
        name, reply = row["prompt_id"], row["completion_tokens"]
        asked = prompts[name] if prompt[name] is None else prompt[name]
        total += weights[name] * (asked + (len(row["response"] or "") // 4 if reply is None else reply))
    return total


class _StandInEngine(LoggedEngine):
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
        self._log, self._forced = log, not _has_free_replies(stage.work.settings)
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
        roles = tuple(message["role"] for message in messages)
        asked = dataclasses.replace(sampling, seed=None, grammar=sampling.grammar if self._forced else None)
        self._estimate.forms.setdefault(canonical_json([roles, asked.key()]), (roles, asked))
        shown = tokens if self._reply else EXPECTED_SHARE * tokens
        self._log[key] = Completion(self._text(sampling, shown), "stop", prompt, round(tokens), 0)
        return self._log[key]

    def _text(self, sampling: Sampling, tokens: float) -> str:
        grammar = sampling.grammar
        if grammar is None or grammar.kind == "regex":
            return self._filler(tokens)
        if grammar.kind == "choice":
            return str(grammar.decoded()[0])
        fields: dict[str, Any] = grammar.decoded()["properties"]
        texts = sum(field.get("type") == "string" and "enum" not in field for field in fields.values())
        # Of several answers each scores more than the one before: a tie would save the calls that compare the best.
        scored = [name for name, field in fields.items() if "minimum" in field]
        places = {name: place for place, name in enumerate(scored)}
        each = tokens / max(texts, 1)
        return json.dumps({name: self._value(field, each, places.get(name, 0)) for name, field in fields.items()})

    def _value(self, field: Mapping[str, Any], tokens: float, place: int) -> Any:
        if "enum" in field:
            return field["enum"][0]
        if field.get("type") == "array":
            one, count = field["items"], field.get("maxItems", 1)
            return [f"{n} {self._value(one, tokens / count, place)}"[: one.get("maxLength")] for n in range(count)]
        if field.get("type") == "string":
            return self._filler(tokens)[: field.get("maxLength")]
        if field.get("type") == "boolean":
            return True
        lowest = field.get("minimum", 0)
        return min(lowest + place, field.get("maximum", lowest + place))

    def _filler(self, tokens: float) -> str:
        return f"{len(self._log):05d} {_WORD * round(max(tokens - self._number, 0) / self._word)}".rstrip()
