"""Verdicts of judge models on the answers to public benchmarks, one stage per judge model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ray_pipeline.bench.alpaca_eval.judging import AlpacaEvalJudging
from ray_pipeline.bench.mt_bench.judging import MtBenchJudging
from ray_pipeline.bench.questions import BenchmarkJudging, BenchmarksSettings
from ray_pipeline.bench.schemas import BENCHMARK_TABLES
from ray_pipeline.bench.tables import answers_by_key, question_key
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, reply_status
from ray_pipeline.graph.stage import Stage


class _Judging(Settings):
    judge: str
    mt_bench: MtBenchJudging | None
    alpaca_eval: AlpacaEvalJudging | None

    @property
    def parts(self) -> dict[str, BenchmarkJudging]:
        """What this judge judges by benchmark, in order."""
        parts: dict[str, BenchmarkJudging | None] = {"mt_bench": self.mt_bench, "alpaca_eval": self.alpaca_eval}
        return {name: part for name, part in parts.items() if part is not None}


class _Judgement(NamedTuple):
    """One model's answers to a question, and those that they are compared with, if any."""

    prompt_id: str
    question: Row
    model: str
    table: str
    answers: list[Row]
    against: list[Row]


def _judgements(shard: ShardTables, settings: _Judging) -> Iterator[_Judgement]:
    """Per table ordered by question, then by the models' names."""
    answers = answers_by_key(shard.under("answers/"))
    models = sorted({model for _, _, model in answers})
    questions = shard.rows("questions")
    for benchmark, part in settings.parts.items():
        for table, against in part.tables().items():
            for question in questions:
                if question["benchmark"] == benchmark:
                    key = benchmark, question["question_id"]
                    other = [] if against is None else answers[*key, against]
                    for model in models:
                        if model != against:
                            yield _Judgement(question["prompt_id"], question, model, table, answers[*key, model], other)


async def _judge(engine: ChatEngine, settings: _Judging, item: _Judgement) -> Outcome:
    part = settings.parts[item.question["benchmark"]]
    rows = await part.judge(engine, item.table, item.question, item.answers, item.against)
    replies = reply_status(f"the benchmark judge {settings.judge}", *(row["parse_status"] for row in rows))
    return Outcome({item.table: [{**row, **question_key(item.question, item.model)} for row in rows]}, replies)


_ROLES = {
    "bench_ratings": "benchmark-judge/mt_bench",
    "bench_comparisons": "benchmark-judge/mt_bench/pairwise",
    "bench_preferences": "benchmark-judge/alpaca_eval",
}

JUDGE = Asking(
    tables={kind: BENCHMARK_TABLES[kind] for kind in _ROLES},
    items=_judgements,
    ask=_judge,
    role=lambda settings, item: _ROLES[item.table],
)


def judge_stages(
    settings: BenchmarksSettings, judges: Mapping[str, ModelSettings], inputs: Mapping[str, Stage]
) -> list[Stage]:
    """One stage per judge model, over all models' answers.

    Args:
        inputs: the stage of questions, and the stages of answers under "answers/NAME".

    Raises:
        BenchmarkFileError, TemplateError: a prompt file cannot be used.
    """
    stages = []
    for key in settings.judges:
        parts: dict[str, Any] = {"mt_bench": None, "alpaca_eval": None}
        for name, block in settings.chosen.items():
            if any(judge == key for judge, _ in block.judged().values()):
                parts[name] = block.judging()
        judging = _Judging(judge=key, **parts)
        kinds = [kind for part in judging.parts.values() for kind in part.tables()]
        asking = dataclasses.replace(JUDGE, tables={kind: JUDGE.tables[kind] for kind in kinds})
        stages.append(asking.stage(f"bench-judge-{key}", judging, judges[key], dict(inputs), group="bench-judge"))
    return stages
