"""Preferences of a judge model between stored answers and AlpacaEval's reference outputs."""

from __future__ import annotations

from collections.abc import Sequence

from ray_pipeline.bench.alpaca_eval.judge import PreferenceAsking
from ray_pipeline.bench.alpaca_eval.questions import OrderRule, instruction_of
from ray_pipeline.bench.alpaca_eval.score import annotate
from ray_pipeline.bench.judge_prompts import PreferencePrompt
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.graph.asking import Row


class AlpacaEvalJudging(Settings):
    """Everything that the preferences depend on, beside the judge."""

    prompt: PreferencePrompt
    asking: PreferenceAsking
    order: OrderRule
    order_seed: int

    def tables(self) -> dict[str, str | None]:
        """Kinds of table; the reference outputs do not come from a model of the run."""
        return {"bench_preferences": None}

    async def judge(
        self, engine: ChatEngine, table: str, question: Row, answers: Sequence[Row], against: Sequence[Row]
    ) -> list[Row]:
        """Rows of one model's answer to an instruction, without the columns that all tables share."""
        annotation = await annotate(
            engine,
            instruction_of(question),
            answers[0]["answer"],
            self.prompt,
            self.asking,
            self.order,
            self.order_seed,
        )
        return [{"place": place, **vars(preference)} for place, preference in annotation.asked.items()]
