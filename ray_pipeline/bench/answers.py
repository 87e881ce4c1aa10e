"""Answers to the questions of the benchmarks: by a model, or by the floors, which use no model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.benchmark import CategorySampling
from ray_pipeline.bench.conversation import answer_turns
from ray_pipeline.bench.floors import FLOORS
from ray_pipeline.bench.settings import BenchmarksSettings
from ray_pipeline.bench.tables import question_key
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine, Message, Sampling
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.keys import derived_seed
from ray_pipeline.store.schemas import BENCH_ANSWERS, to_table

#: Prefix of a floor's name in the tables: "floor:echo".
FLOOR = "floor:"


class _Answering(Settings):
    """Exactly the settings that an answer depends on, so that another judge or reference does not repeat answers.

    `parts`: by benchmark, what `Benchmark.answering` returns.
    """

    label: str
    seed: int
    parts: dict[str, Any]

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        # Fingerprints of stored runs have these three, null where a benchmark is left out.
        parts = {name: part.decisive() for name, part in self.parts.items()}
        return {"label": self.label, "seed": self.seed, "mt_bench": None, "alpaca_eval": None, "ifeval": None, **parts}

    def sampling(self, question: Row, turn: int) -> Sampling:
        """Sampling of one turn; all models answer a turn above temperature 0 with the same seed."""
        benchmark = question["benchmark"]
        part: CategorySampling | SamplingSettings = self.parts[benchmark]
        made = part.sampling(question["category"]) if isinstance(part, CategorySampling) else part.sampling()
        if made.temperature == 0:
            return made
        seed = derived_seed("benchmark", self.seed, benchmark, question["question_id"], turn)
        return Sampling(made.temperature, made.top_p, made.max_tokens, seed, extra=made.extra)


class _Question(NamedTuple):
    prompt_id: str
    row: Row


def _questions(shard: ShardTables, settings: _Answering) -> list[_Question]:
    return [_Question(row["prompt_id"], row) for row in shard.rows("questions")]


async def _answer(engine: ChatEngine, settings: _Answering, item: _Question) -> Outcome:
    turns = item.row["turns"]
    sampling = [settings.sampling(item.row, turn) for turn, _ in enumerate(turns, 1)]
    conversation = await answer_turns(engine, turns, sampling)
    rows = _rows(item.row, settings.label, conversation.turns, conversation.finish_reasons, conversation.errors)
    return Outcome(
        {"bench_answers": rows}, [(f"the model {settings.label}", "error" not in conversation.finish_reasons)]
    )


ANSWER = Asking(
    tables={"bench_answers": BENCH_ANSWERS},
    items=_questions,
    ask=_answer,
    role=lambda settings, item: f"benchmark/{item.row['benchmark']}/{settings.label}",
)


def answers(
    label: str, settings: BenchmarksSettings, model: ModelSettings, questions: Stage, train: Stage | None = None
) -> Stage:
    """One model's answers to all chosen benchmarks, ordered by question and turn: its engine starts once for all.

    Args:
        train: the stage that makes the model's weights; its fingerprint stands for them.
    """
    parts = {name: block.answering() for name, block in settings.chosen.items()}
    given = _Answering(label=label, seed=settings.seed, parts=parts)
    name, inputs = f"bench-answers-{label}", {"questions": questions}
    return ANSWER.stage(name, given, model, inputs, group="bench-answers", train=train)


def _rows(
    question: Row, model: str, texts: Sequence[str | None], reasons: Sequence[str], errors: Sequence[str | None]
) -> list[Row]:
    key = question_key(question, model)
    return [
        {**key, "turn": turn, "answer": text, "finish_reason": reason, "error": error}
        for turn, (text, reason, error) in enumerate(zip(texts, reasons, errors, strict=True), 1)
    ]


class _Floors(Settings):
    floors: tuple[str, ...]


def floors(settings: BenchmarksSettings, questions: Stage) -> Stage:
    """Answers of the chosen floors; no model is called."""
    given = _Floors(floors=settings.floors)
    return Stage(
        name="bench-floors",
        group="bench-answers",
        work=ShardWork(function=floor_shard, tables=("bench_answers",), settings=given),
        config=given.decisive(),
        inputs={"questions": questions},
    )


def floor_shard(given: ShardInput) -> ShardOutput:
    """The floors' answers of one shard, ordered by question, floor and turn."""
    settings: _Floors = given.settings
    rows: list[Row] = []
    for question in given.tables["questions"].to_pylist():
        for name in settings.floors:
            messages: list[Message] = []
            texts: list[str] = []
            for turn in question["turns"]:
                messages.append({"role": "user", "content": turn})
                texts.append(FLOORS[name](messages))
                messages.append({"role": "assistant", "content": texts[-1]})
            rows += _rows(question, FLOOR + name, texts, ["stop"] * len(texts), [None] * len(texts))
        given.tick(1)
    return ShardOutput({"bench_answers": to_table(rows, BENCH_ANSWERS)})
