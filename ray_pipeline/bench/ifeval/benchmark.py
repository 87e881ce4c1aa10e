"""IFEval as a benchmark: the block that chooses its prompts, the verdicts of its checkers, and its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.benchmark import Benchmark, Checking, Measurement, Reading, Score, Scored, make_score, percent
from ray_pipeline.bench.files import BenchmarkFileError, source_rows
from ray_pipeline.bench.ifeval.questions import IfevalPrompt, prompt_of, prompt_row_of, prompts_of
from ray_pipeline.bench.ifeval.score import Accuracy, IfevalVerdict, check, ifeval_protocol, published_ifeval
from ray_pipeline.bench.ifeval.score import scores as accuracies
from ray_pipeline.config.settings import Settings
from ray_pipeline.constraints.official import CheckersMissing, checker_version, checkers, load_checkers
from ray_pipeline.extensions import register
from ray_pipeline.graph.asking import Row
from ray_pipeline.stats.protocol import settings_text

_ACCURACIES = {
    "prompt_strict": "prompt, strict",
    "instruction_strict": "instruction, strict",
    "prompt_loose": "prompt, loose",
    "instruction_loose": "instruction, loose",
}


class IfevalChecking(Settings):
    """The official checkers, by version."""

    checkers: str
    table: ClassVar[str] = "bench_checks"

    def verdicts(self, question: Row, answers: Sequence[Row]) -> list[Row]:
        """Raises BenchmarkFileError if they are missing on this node or do not support an instruction."""
        prompt = prompt_of(question)
        try:
            (found,) = check([prompt], {prompt.key: answers[0]["answer"]}, checkers())
        except CheckersMissing as error:
            raise BenchmarkFileError(str(error)) from error
        return [
            {
                "strict": list(found.strict),
                "loose": list(found.loose),
                "answered": found.answered,
                "chance": found.chance,
            }
        ]


@register("benchmark", "ifeval")
class IfevalSettings(Benchmark):
    """The `ifeval` block: prompts in the published form. The checkers come with the extra `ifeval`."""

    prompts: str = Field(
        "hf://datasets/google/IFEval/ifeval_input_data.jsonl", description="prompt file in the published form"
    )
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1280)
    titles: ClassVar = {"types": "IFEval by family and type"}

    def sources(self) -> dict[str, str]:
        return {"prompts": self.prompts}

    def rows(self) -> list[Row]:
        prompts = prompts_of(source_rows(self.prompts), self.prompts)
        return [prompt_row_of(prompt, place) for place, prompt in enumerate(prompts)]

    def check(self, rows: Sequence[Row]) -> None:
        """Raises BenchmarkFileError if the checkers are missing or an instruction is unknown to them."""
        try:
            known = load_checkers().registry
        except CheckersMissing as error:
            raise BenchmarkFileError(f"ifeval: {error}") from error
        for prompt in map(prompt_of, rows):
            for name in prompt.instructions:
                if name not in known:
                    raise BenchmarkFileError(
                        f"ifeval.prompts: prompt {prompt.key} of {self.prompts} has the instruction {name}, "
                        "which no checker supports"
                    )

    def answering(self) -> SamplingSettings:
        return self.sampling

    def checking(self) -> Checking:
        try:
            return IfevalChecking(checkers=checker_version())
        except CheckersMissing as error:
            raise BenchmarkFileError(str(error)) from error

    def scores(self, run: Measurement) -> Scored:
        result, prompts = Scored(), [prompt_of(row) for row in run.questions]
        for model, rows in run.verdicts(IfevalChecking.table).items():
            verdicts = [
                IfevalVerdict(int(r["question_id"]), tuple(r["strict"]), tuple(r["loose"]), r["answered"], r["chance"])
                for r in rows
            ]
            scores, types, reading = _accuracies(model, prompts, verdicts, self.sampling, run)
            result.add(scores, reading, "types", types)
        return result


def _accuracies(
    model: str,
    prompts: Sequence[IfevalPrompt],
    verdicts: Sequence[IfevalVerdict],
    sampling: SamplingSettings,
    run: Measurement,
) -> tuple[list[Score], list[dict[str, Any]], Reading]:
    """The four accuracies; rows of the table of types; and how many prompts have no response."""
    found = accuracies(prompts, verdicts, draws=run.draws, seed=run.seed)
    answers = settings_text(**sampling.model_dump())
    scores = []
    for field, words in _ACCURACIES.items():
        accuracy: Accuracy = getattr(found, field)
        scores.append(
            make_score(
                model,
                run.benchmark,
                words,
                ifeval_protocol(prompts, words, answers),
                published_ifeval(words),
                value=percent(accuracy.interval.mean),
                low=percent(accuracy.interval.low),
                high=percent(accuracy.interval.high),
                rows=accuracy.total,
                unread=found.unanswered,
                worst=percent(accuracy.interval.mean),
                best=percent(accuracy.best),
            )
        )
    rows = [{"model": model, **dataclasses.asdict(one)} for one in (*found.families, *found.types)]
    statuses = {"answered": len(verdicts) - found.unanswered, "unanswered": found.unanswered}
    return scores, rows, Reading(model, run.benchmark, statuses, chance=found.chance)
