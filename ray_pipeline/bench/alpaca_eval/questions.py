"""AlpacaEval's instructions with their reference outputs, the settings that choose them, and their rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.alpaca_eval.judge import PreferenceAsking
from ray_pipeline.bench.alpaca_eval.length_controlled import GamedRows, difficulties_of, gamed_rows_of
from ray_pipeline.bench.files import OWN, need, question_row, read_csv, read_text, source_rows
from ray_pipeline.bench.judge_prompts import PreferencePrompt, own_preference_prompt, preference_prompt
from ray_pipeline.config.settings import Settings

if TYPE_CHECKING:
    from ray_pipeline.bench.questions import BenchmarkJudging
    from ray_pipeline.bench.scores import Measurement, Scored
    from ray_pipeline.graph.stage import Stage

#: Where the model's output is shown: by the published coin of each instruction, or once in each place.
OrderRule = Literal["seeded", "both"]

#: Who wrote the published reference outputs.
REFERENCE = "gpt4_1106_preview"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction with the reference's output; `index` is its place in the published file."""

    index: int
    instruction: str
    reference: str
    dataset: str = ""


#: The published instructions, at any commit of the dataset; a copy elsewhere may have been edited.
_PUBLISHED_REFERENCE = re.compile(r"hf://datasets/tatsu-lab/alpaca_eval(@[\w.-]+)?/alpaca_eval_gpt4_baseline\.json")


class AlpacaEvalSettings(Settings):
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
    limit: int | None = Field(
        None, ge=1, description="maximum number of instructions (smallest hashes kept); default: all"
    )

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

    def load(self) -> list[Instruction]:
        """Raises BenchmarkFileError."""
        return instructions_of(source_rows(self.reference), self.reference)

    def judge_prompt(self) -> PreferencePrompt:
        """Raises BenchmarkFileError or TemplateError."""
        if self.prompt == OWN:
            return own_preference_prompt()
        return preference_prompt(read_text(self.prompt), self.prompt, self.labels)

    def length_data(self) -> tuple[GamedRows, Any] | None:
        """Gamed rows and difficulties by place, or None. Raises BenchmarkFileError."""
        if self.gamed is None:
            return None
        gamed = read_csv(self.gamed)
        hard = read_csv(self.difficulties) if self.difficulties is not None else gamed
        return gamed_rows_of(gamed, self.gamed), difficulties_of(hard, self.difficulties or self.gamed)

    def sources(self) -> dict[str, str]:
        """Place of every question file by its key."""
        return {"reference": self.reference}

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the questions table. Raises BenchmarkFileError."""
        return [
            question_row("alpaca_eval", i.index, i.index, [i.instruction], category=i.dataset, references=[i.reference])
            for i in self.load()
        ]

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises TemplateError or BenchmarkFileError for an unusable judge prompt or file of the length control."""
        self.judge_prompt()
        self.length_data()

    def judged(self) -> dict[str, tuple[str, SamplingSettings]]:
        """Key of every sampling of a judge, with the judge's key."""
        return {"asking.sampling": (self.judge, self.asking.sampling)}

    def answered(self) -> dict[str, SamplingSettings]:
        """Key of every sampling of the measured models."""
        return {"sampling": self.sampling}

    def judging(self) -> BenchmarkJudging:
        """What the judge needs. Raises BenchmarkFileError or TemplateError."""
        from ray_pipeline.bench.alpaca_eval.judging import AlpacaEvalJudging

        return AlpacaEvalJudging.part_of(self, prompt=self.judge_prompt())

    def checks(self, inputs: Mapping[str, Stage]) -> list[Stage]:
        """Only models judge."""
        return []

    def scores(self, run: Measurement) -> Scored:
        """Scores of all models from the stored tables."""
        from ray_pipeline.bench.alpaca_eval.scores import scored

        return scored(self, run)


def instructions_of(rows: Sequence[Mapping[str, Any]], source: str = "reference outputs") -> list[Instruction]:
    """Instructions from rows of a reference file: instruction, output, dataset (which may be missing).

    Raises:
        BenchmarkFileError: an instruction or output is missing.
    """
    return [
        Instruction(n - 1, need(r, "instruction", source, n), need(r, "output", source, n), r.get("dataset") or "")
        for n, r in enumerate(rows, 1)
    ]


def instruction_of(row: Mapping[str, Any]) -> Instruction:
    """AlpacaEval's instruction in a row of the table."""
    return Instruction(row["position"], row["turns"][0], row["references"][0], row["category"])
