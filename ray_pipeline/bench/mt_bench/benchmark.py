"""MT-Bench as a benchmark: the block that chooses its questions, what its judge does, and its scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.benchmark import Benchmark, CategorySampling, Judging, Measurement, Scored
from ray_pipeline.bench.conversation import Conversation
from ray_pipeline.bench.files import OWN, read_rows, source_rows
from ray_pipeline.bench.judge_prompts import BenchPrompt, mt_bench_prompts, own_mt_bench_prompts
from ray_pipeline.bench.mt_bench.judge import BenchAsking, TurnComparison, TurnRating
from ray_pipeline.bench.mt_bench.questions import (
    ANSWER_TOKENS,
    CATEGORY_TEMPERATURES,
    question_of,
    question_row_of,
    questions_of,
)
from ray_pipeline.bench.mt_bench.score import Mode, compare, grade, mt_bench_protocol
from ray_pipeline.bench.mt_bench.scores import mt_bench_grades, mt_bench_pairs
from ray_pipeline.config.settings import NewTokens, Settings, Temperature
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.extensions import register
from ray_pipeline.graph.asking import Row
from ray_pipeline.stats.protocol import Protocol


class MtBenchJudging(Settings):
    """Everything that the verdicts depend on, beside the judge."""

    prompts: dict[str, BenchPrompt]
    asking: BenchAsking
    modes: tuple[Literal["single", "pairwise"], ...]
    against: str

    def tables(self) -> dict[str, str | None]:
        """Kinds of table in order, each with the model that all others are compared with."""
        kinds = {"bench_ratings": ("single", None), "bench_comparisons": ("pairwise", self.against)}
        return {kind: against for kind, (mode, against) in kinds.items() if mode in self.modes}

    async def verdicts(
        self, engine: ChatEngine, table: str, question: Row, answers: Sequence[Row], against: Sequence[Row]
    ) -> list[Row]:
        asked, own = question_of(question), _conversation(answers)
        if table == "bench_ratings":
            return [vars(r) for r in await grade(engine, asked, own, self.prompts, self.asking)]
        comparisons = await compare(engine, asked, own, _conversation(against), self.prompts, self.asking)
        return [{"against": self.against, **vars(c)} for c in comparisons]


def _conversation(rows: Sequence[Row]) -> Conversation:
    return Conversation(tuple(row["answer"] for row in rows), tuple(row["finish_reason"] for row in rows))


@register("benchmark", "mt_bench")
class MtBenchSettings(Benchmark):
    """The `mt_bench` block. The defaults are the published protocol, except for the judge and its prompts."""

    questions: str = Field(
        "hf://spaces/lmsys/mt-bench/data/mt_bench/question.jsonl", description="question file in the published form"
    )
    references: str | None = Field(
        "hf://spaces/pe-nlp/mt-bench/data/mt_bench/reference_answer/gpt-4.jsonl",
        description="reference answers shown in math, reasoning and coding; null: none",
    )
    reference_name: str = Field("gpt-4", description="model whose answers the reference file holds")
    prompts: str = Field(OWN, description="judge prompts in the published form; `own`: the project's wording")
    judge: str = Field("judge", description="key of the judging model")
    asking: BenchAsking = BenchAsking()
    modes: tuple[Mode, ...] = Field(
        ("single",),
        min_length=1,
        description="grades of single answers, comparisons with `against` in both orders, or both",
    )
    against: str = Field("base", description="model (by its name in this run) that the others are compared with")
    answer_tokens: NewTokens = Field(ANSWER_TOKENS, description="maximum number of new tokens of an answer")
    temperatures: dict[str, Temperature] = Field(
        default_factory=lambda: dict(CATEGORY_TEMPERATURES), description="category → temperature of the answers"
    )
    titles: ClassVar = {"categories": "MT-Bench by category"}

    def judge_prompts(self) -> dict[str, BenchPrompt]:
        """Raises BenchmarkFileError or TemplateError."""
        if self.prompts == OWN:
            return own_mt_bench_prompts()
        return mt_bench_prompts(read_rows(self.prompts), self.prompts)

    def sources(self) -> dict[str, str]:
        references = {} if self.references is None else {"references": self.references}
        return {"questions": self.questions, **references}

    def rows(self) -> list[Row]:
        references = source_rows(self.references) if self.references is not None else []
        questions = questions_of(source_rows(self.questions), references, self.questions)
        return [question_row_of(question, place) for place, question in enumerate(questions)]

    def check(self, rows: Sequence[Row]) -> None:
        self.judge_prompts()

    def judged(self) -> dict[str, tuple[str, SamplingSettings]]:
        return {"asking.sampling": (self.judge, self.asking.sampling)}

    def judging(self) -> Judging:
        return MtBenchJudging.part_of(self, prompts=self.judge_prompts())

    def answering(self) -> CategorySampling:
        return CategorySampling.part_of(self)

    def baselines(self) -> dict[str, str]:
        return {"against": self.against} if "pairwise" in self.modes else {}

    def scores(self, run: Measurement) -> Scored:
        """By single grading and by comparison, as far as their tables exist."""
        questions, prompts = [question_of(row) for row in run.questions], self.judge_prompts()
        result, judge = Scored(), run.judges[self.judge]

        def protocol(mode: Mode, contradictory: int, reference: str) -> Protocol:
            made = mt_bench_protocol(
                mode,
                questions,
                prompts,
                self.asking,
                judge.identity,
                contradictory,
                reference=reference,
                answer_tokens=self.answer_tokens,
                temperatures=self.temperatures,
            )
            return judge.marked(made)

        for model, rows in run.verdicts("bench_ratings").items():
            ratings = [_of_row(TurnRating, row) for row in rows]
            measured = functools.partial(protocol, "single", reference=self.reference_name)
            scores, categories, reading = mt_bench_grades(model, ratings, run, measured)
            result.add(scores, reading, "categories", categories)
        for model, rows in run.verdicts("bench_comparisons").items():
            if model != self.against:
                pairs = [_of_row(TurnComparison, row) for row in rows]
                measured = functools.partial(protocol, "pairwise", reference=self.against)
                scores, categories, reading = mt_bench_pairs(model, self.against, pairs, run, measured)
                result.add(scores, reading, "categories", categories)
        return result


def _of_row(kind: Any, row: Row) -> Any:
    values = {field.name: row[field.name] for field in dataclasses.fields(kind)}
    return kind(**{**values, "question_id": int(row["question_id"])})
