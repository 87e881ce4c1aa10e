"""Answers to the questions of the public benchmarks: by a model, or by the floors, which use no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.floors import FLOORS
from ray_pipeline.bench.mt_bench.judge import answer_turns
from ray_pipeline.bench.mt_bench.questions import MtBenchAnswering
from ray_pipeline.bench.questions import BenchmarksSettings
from ray_pipeline.bench.schemas import BENCH_ANSWERS
from ray_pipeline.bench.tables import question_key
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.candidates import reply_columns
from ray_pipeline.engines.base import ChatEngine, Message, Sampling
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.keys import derived_seed
from ray_pipeline.store.schemas import to_table

#: Prefix of a floor's name in the tables: "floor:echo".
FLOOR = "floor:"


class _Answering(Settings):
    """Exactly the settings that an answer depends on, so that another judge or reference does not repeat answers."""

    label: str
    seed: int
    mt_bench: MtBenchAnswering | None
    alpaca_eval: SamplingSettings | None
    ifeval: SamplingSettings | None

    def sampling(self, benchmark: str, category: str, question: str, turn: int) -> Sampling:
        """Sampling of one turn; all models answer a turn above temperature 0 with the same seed."""
        given = getattr(self, benchmark)
        made: Sampling = given.sampling(category) if isinstance(given, MtBenchAnswering) else given.sampling()
        if made.temperature == 0:
            return made
        return Sampling(
            made.temperature,
            made.top_p,
            made.max_tokens,
            derived_seed("benchmark", self.seed, benchmark, question, turn),
            extra=made.extra,
        )


class _Question(NamedTuple):
    prompt_id: str
    row: Row


def _questions(shard: ShardTables, settings: _Answering) -> list[_Question]:
    return [_Question(row["prompt_id"], row) for row in shard.rows("questions")]


async def _answer(engine: ChatEngine, settings: _Answering, item: _Question) -> Outcome:
    question = item.row
    name, turns = question["benchmark"], question["turns"]
    sampling = [settings.sampling(name, question["category"], question["question_id"], t) for t in (1, 2)]
    texts: list[str | None]
    if len(turns) == 2:
        conversation = await answer_turns(engine, turns, sampling)
        texts, reasons = list(conversation.turns), list(conversation.finish_reasons)
    else:
        reply = await reply_columns(engine, [{"role": "user", "content": turns[0]}], sampling[0])
        texts, reasons = [reply["response"]], [reply["finish_reason"]]
    rows = _rows(question, settings.label, texts, reasons)
    return Outcome({"bench_answers": rows}, [(f"the model {settings.label}", "error" not in reasons)])


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
    mt, alpaca, ifeval = settings.mt_bench, settings.alpaca_eval, settings.ifeval
    given = _Answering(
        label=label,
        seed=settings.seed,
        mt_bench=mt and MtBenchAnswering.part_of(mt),
        alpaca_eval=alpaca and alpaca.sampling,
        ifeval=ifeval and ifeval.sampling,
    )
    name, inputs = f"bench-answers-{label}", {"questions": questions}
    return ANSWER.stage(name, given, model, inputs, group="bench-answers", train=train)


def _rows(question: Row, model: str, texts: Sequence[str | None], reasons: Sequence[str]) -> list[Row]:
    return [
        {
            **question_key(question, model),
            "turn": turn,
            "answer": text,
            "finish_reason": reason,
        }
        for turn, (text, reason) in enumerate(zip(texts, reasons, strict=True), 1)
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
            rows += _rows(question, FLOOR + name, texts, ["stop"] * len(texts))
        given.tick(1)
    return ShardOutput({"bench_answers": to_table(rows, BENCH_ANSWERS)})
