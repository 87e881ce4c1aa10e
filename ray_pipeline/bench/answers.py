"""Answers to the questions of the public benchmarks: of a model, or of the floors, which know nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.floors import FLOORS
from ray_pipeline.bench.mt_bench.judge import answer_turns
from ray_pipeline.bench.mt_bench.score import OTHER_TEMPERATURE
from ray_pipeline.bench.questions import BenchmarksSettings
from ray_pipeline.bench.schemas import BENCH_ANSWERS
from ray_pipeline.engines.base import EngineError, Message, PromptTooLong, Sampling
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.keys import derived_seed
from ray_pipeline.store.schemas import to_table
from ray_pipeline.store.settings import Settings

#: Floors answer under this name and their own: "floor:echo".
FLOOR = "floor:"


class _Answering(Settings):
    """What decides an answer, and nothing else: a judge or a reference that changes asks no model again."""

    label: str
    seed: int
    mt_bench: dict[str, Any] | None
    alpaca_eval: SamplingSettings | None
    ifeval: SamplingSettings | None

    def sampling(self, benchmark: str, category: str, question: str, turn: int) -> Sampling:
        """How a turn is answered; all models draw a warm turn with the same seed."""
        given = getattr(self, benchmark)
        if benchmark == "mt_bench":
            temperature = given["temperatures"].get(category, OTHER_TEMPERATURE)
            made = Sampling(temperature=temperature, max_tokens=given["answer_tokens"])
        else:
            made = given.sampling()
        if made.temperature == 0:
            return made
        return Sampling(
            made.temperature,
            made.top_p,
            made.max_tokens,
            derived_seed("benchmark", self.seed, benchmark, question, turn),
            extra=made.extra,
        )


def answers(
    label: str,
    settings: BenchmarksSettings,
    failure: FailureSettings,
    model: ModelSettings,
    questions: Stage,
    train: Stage | None = None,
) -> Stage:
    """One model's answers to all chosen benchmarks: one start of its engine for all of them.

    Args:
        train: the stage that makes the model's weights; its fingerprint stands for them.
    """
    mt, alpaca, ifeval = settings.mt_bench, settings.alpaca_eval, settings.ifeval
    given = _Answering(
        label=label,
        seed=settings.seed,
        mt_bench=mt and {"answer_tokens": mt.answer_tokens, "temperatures": mt.temperatures},
        alpaca_eval=alpaca and alpaca.sampling,
        ifeval=ifeval and ifeval.sampling,
    )
    return llm_stage(
        f"bench-answers-{label}",
        answer_shard,
        ("bench_answers",),
        given,
        model,
        failure,
        {"questions": questions},
        group="bench-answers",
        train=train,
    )


async def answer_shard(given: ShardInput) -> ShardOutput:
    """The answers of one shard, ordered by question and turn."""
    found = await all_of(_answer(given, given.settings, row) for row in given.tables["questions"].to_pylist())
    return ShardOutput({"bench_answers": to_table([row for rows in found for row in rows], BENCH_ANSWERS)})


async def _answer(given: ShardInput, settings: _Answering, question: Mapping[str, Any]) -> list[dict[str, Any]]:
    assert given.engine is not None
    name, turns = question["benchmark"], question["turns"]
    engine = given.engine.bound(question["prompt_id"], f"benchmark/{name}/{settings.label}")
    sampling = [settings.sampling(name, question["category"], question["question_id"], t) for t in (1, 2)]
    if len(turns) == 2:
        said = await answer_turns(engine, turns, sampling)
        texts, reasons = list(said.turns), list(said.finish_reasons)
    else:
        try:
            reply = await engine.chat([{"role": "user", "content": turns[0]}], sampling[0])
            texts, reasons = [reply.text], [reply.finish_reason]
        except PromptTooLong:
            texts, reasons = [None], ["too_long"]
        except EngineError:
            texts, reasons = [None], ["error"]
    given.watch(f"the model {settings.label}", "error" not in reasons)
    given.tick(1)
    return _rows(question, settings.label, texts, reasons)


def _rows(question: Mapping[str, Any], model: str, texts: list[Any], reasons: list[str]) -> list[dict[str, Any]]:
    return [
        {
            **{key: question[key] for key in ("benchmark", "question_id", "prompt_id")},
            "model": model,
            "turn": turn,
            "answer": text,
            "finish_reason": reason,
        }
        for turn, (text, reason) in enumerate(zip(texts, reasons, strict=True), 1)
    ]


class _Floors(Settings):
    floors: tuple[str, ...]


def floors(settings: BenchmarksSettings, questions: Stage) -> Stage:
    """Answers of the floors that are asked for; no model is called."""
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
    rows: list[dict[str, Any]] = []
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
