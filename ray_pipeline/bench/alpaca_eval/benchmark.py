"""AlpacaEval 2 as a benchmark: the block that chooses its files, what its judge does, and its scores."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.alpaca_eval.judge import PairPreference, PreferenceAsking
from ray_pipeline.bench.alpaca_eval.length_controlled import GamedRows, difficulties_of, gamed_rows_of
from ray_pipeline.bench.alpaca_eval.questions import (
    REFERENCE,
    OrderRule,
    instruction_of,
    instruction_row_of,
    instructions_of,
)
from ray_pipeline.bench.alpaca_eval.score import Annotation, annotate
from ray_pipeline.bench.alpaca_eval.scores import AlpacaEvalRules, alpaca_eval_rates
from ray_pipeline.bench.benchmark import Benchmark, Judging, Measurement, Scored
from ray_pipeline.bench.files import OWN, read_csv, read_text, source_rows
from ray_pipeline.bench.judge_prompts import PreferencePrompt, own_preference_prompt, preference_prompt
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.extensions import register
from ray_pipeline.graph.asking import Row
from ray_pipeline.stats.bootstrap import Floats
from ray_pipeline.stats.protocol import settings_text

#: The published instructions, at any commit of the dataset; a copy elsewhere may have been edited.
_PUBLISHED_REFERENCE = re.compile(r"hf://datasets/tatsu-lab/alpaca_eval(@[\w.-]+)?/alpaca_eval_gpt4_baseline\.json")


class AlpacaEvalJudging(Settings):
    """Everything that the preferences depend on, beside the judge."""

    prompt: PreferencePrompt
    asking: PreferenceAsking
    order: OrderRule
    order_seed: int

    def tables(self) -> dict[str, str | None]:
        """Kinds of table; the reference outputs do not come from a model of the run."""
        return {"bench_preferences": None}

    async def verdicts(
        self, engine: ChatEngine, table: str, question: Row, answers: Sequence[Row], against: Sequence[Row]
    ) -> list[Row]:
        instruction, output = instruction_of(question), answers[0]["answer"]
        found = await annotate(engine, instruction, output, self.prompt, self.asking, self.order, self.order_seed)
        return [{"place": place, **vars(preference)} for place, preference in found.asked.items()]


@register("benchmark", "alpaca_eval")
class AlpacaEvalSettings(Benchmark):
    """The `alpaca_eval` block. The defaults are the published protocol, except for the judge and its prompt."""

    reference: str = Field(
        "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json",
        description="instructions with the outputs that a model is compared with",
    )
    reference_name: str = Field(REFERENCE, description="model whose outputs the reference file holds")
    gamed: str | None = Field(
        "hf://datasets/tatsu-lab/alpaca_eval/df_gamed.csv",
        description="rows of the gamed baselines for the published length control; null: a fit without them",
    )
    difficulties: str | None = Field(None, description="difficulty per instruction, by position; default: from `gamed`")
    prompt: str = Field(OWN, description="file with the judge's prompt; `own`: the project's wording")
    labels: tuple[str, str] = Field(("m", "M"), description="replies for the output shown first and second")
    judge: str = Field("judge", description="key of the judging model")
    asking: PreferenceAsking = PreferenceAsking()
    order: OrderRule = Field("seeded", description="the published coin toss per instruction, or both orders")
    order_seed: int = Field(0, description="seed of the coin toss")
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=2048)

    @model_validator(mode="after")
    def _difficulties(self) -> AlpacaEvalSettings:
        if self.difficulties is not None and self.gamed is None:
            raise ValueError("difficulties is read only together with gamed; name both or neither")
        if self.prompt == OWN and self.labels != PreferencePrompt.model_fields["labels"].default:
            raise ValueError("labels is read only with a prompt file; the project's own prompt brings its labels")
        return self

    @property
    def published_instructions(self) -> bool:
        """Whether all instructions of the benchmark's own file on the Hub are used."""
        return self.limit is None and _PUBLISHED_REFERENCE.fullmatch(self.reference) is not None

    def judge_prompt(self) -> PreferencePrompt:
        """Raises BenchmarkFileError or TemplateError."""
        if self.prompt == OWN:
            return own_preference_prompt()
        return preference_prompt(read_text(self.prompt), self.prompt, self.labels)

    def sources(self) -> dict[str, str]:
        return {"reference": self.reference}

    def score_sources(self) -> dict[str, str]:
        places = {"gamed": self.gamed, "difficulties": self.difficulties}
        return {key: place for key, place in places.items() if place is not None}

    def rows(self) -> list[Row]:
        return [instruction_row_of(i) for i in instructions_of(source_rows(self.reference), self.reference)]

    def check(self, rows: Sequence[Row]) -> None:
        self.judge_prompt()
        _length_data(self.gamed, self.difficulties)

    def judged(self) -> dict[str, tuple[str, SamplingSettings]]:
        return {"asking.sampling": (self.judge, self.asking.sampling)}

    def judging(self) -> Judging:
        return AlpacaEvalJudging.part_of(self, prompt=self.judge_prompt())

    def answering(self) -> SamplingSettings:
        return self.sampling

    def scores(self, run: Measurement) -> Scored:
        result, stored = Scored(), run.verdicts("bench_preferences")
        if not stored:
            return result
        rules = AlpacaEvalRules(
            prompt=self.judge_prompt(),
            asking=self.asking,
            judge=run.judges[self.judge],
            order=self.order,
            order_seed=self.order_seed,
            reference=self.reference_name,
            answers=settings_text(**self.sampling.model_dump()),
            length_data=_length_data(self.gamed, self.difficulties),
            published_instructions=self.published_instructions,
            draws=run.draws,
            seed=run.seed,
            benchmark=run.benchmark,
        )
        for model, rows in stored.items():
            scores, table, reading = alpaca_eval_rates(model, _annotations(run, rows, model), rules)
            result.add(scores, reading, "instructions", [table])
        return result


@functools.lru_cache(maxsize=4)
def _length_data(gamed: str | None, difficulties: str | None) -> tuple[GamedRows, Floats] | None:
    """Gamed rows and difficulties by place, or None. Raises BenchmarkFileError."""
    if gamed is None:
        return None
    rows = read_csv(gamed)
    hard = read_csv(difficulties) if difficulties is not None else rows
    return gamed_rows_of(rows, gamed), difficulties_of(hard, difficulties or gamed)


def _annotations(run: Measurement, rows: Sequence[Row], model: str) -> list[Annotation]:
    """Every instruction in the order of the file, with the verdicts on the model's output; none without an output."""
    asked: dict[str, dict[Any, PairPreference]] = {}
    for row in rows:
        preference = PairPreference(row["first"], row["method"], row["label_mass"], row["parse_status"], row["raw"])
        asked.setdefault(row["question_id"], {})[row["place"]] = preference
    return [
        Annotation(instruction_of(question), run.answer(question, model), asked.get(question["question_id"], {}))
        for question in run.questions
    ]
