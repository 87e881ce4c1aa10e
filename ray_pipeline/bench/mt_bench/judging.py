"""Verdicts of a judge model on stored answers to MT-Bench: grades of single answers, and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ray_pipeline.bench.judge_prompts import BenchPrompt
from ray_pipeline.bench.mt_bench.judge import BenchAsking, Conversation
from ray_pipeline.bench.mt_bench.questions import question_of
from ray_pipeline.bench.mt_bench.score import compare, grade
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.graph.asking import Row


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

    async def judge(
        self, engine: ChatEngine, table: str, question: Row, answers: Sequence[Row], against: Sequence[Row]
    ) -> list[Row]:
        """Rows of one model's answers to a question, without the columns that all tables share."""
        asked, own = question_of(question), _conversation(answers)
        if table == "bench_ratings":
            return [vars(r) for r in await grade(engine, asked, own, self.prompts, self.asking)]
        comparisons = await compare(engine, asked, own, _conversation(against), self.prompts, self.asking)
        return [{"against": self.against, **vars(c)} for c in comparisons]


def _conversation(rows: Sequence[Row]) -> Conversation:
    return Conversation((rows[0]["answer"], rows[1]["answer"]), (rows[0]["finish_reason"], rows[1]["finish_reason"]))
