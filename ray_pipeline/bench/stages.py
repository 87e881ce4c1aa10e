"""Public benchmarks as stages: questions → answers of each model → judges and checkers → scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ray_pipeline.bench.answers import answers, floors
from ray_pipeline.bench.judging import judge_stages
from ray_pipeline.bench.questions import BenchmarksSettings, question_rows, questions_stage
from ray_pipeline.bench.report import BenchmarksPage, report_stage
from ray_pipeline.engines.models import ModelSettings, ModelUse
from ray_pipeline.graph.stage import Stage


@dataclasses.dataclass(frozen=True)
class Answering:
    """A model that is measured, and the stage that makes its weights where this run trains it."""

    model: ModelSettings
    train: Stage | None = None


def benchmark_stages(
    settings: BenchmarksSettings,
    page: BenchmarksPage,
    judges: Mapping[str, ModelSettings],
    measured: Mapping[str, Answering],
    *,
    view: str = "report",
) -> list[Stage]:
    """All stages of the chosen benchmarks, the scores last.

    Raises:
        BenchmarkFileError, TemplateError, CheckersMissing: something that they need is missing.
    """
    questions = questions_stage(settings)
    answered = {name: answers(name, settings, one.model, questions, one.train) for name, one in measured.items()}
    if settings.floors:
        answered["floors"] = floors(settings, questions)
    inputs = {"questions": questions, **{f"answers/{name}": stage for name, stage in answered.items()}}
    verdicts = judge_stages(settings, judges, inputs)
    verdicts += [stage for block in settings.chosen.values() for stage in block.checks(inputs)]
    stages = [*inputs.values(), *verdicts]
    return [*stages, report_stage(page, stages, view=view)]


def check_benchmarks(settings: BenchmarksSettings) -> None:
    """Everything that the chosen benchmarks need beside models: files, judge prompts and checkers.

    Raises:
        BenchmarkFileError: something is missing or wrong; the message names it and the remedy.
        TemplateError: a prompt file is not one.
    """
    rows = question_rows(settings)
    for name, block in settings.chosen.items():
        block.check([row for row in rows if row["benchmark"] == name])


def benchmark_uses(settings: BenchmarksSettings, measured: Mapping[str, str], judges: str = "models") -> list[ModelUse]:
    """The keys that choose a model.

    Args:
        measured: key of the configuration → the measured model's key under `models`.
        judges: the block that judging models are chosen from.
    """
    uses = []
    for name, block in settings.chosen.items():
        where = f"benchmarks.{name}"
        for key, (judge, sampling) in block.judged().items():
            uses.append(ModelUse(f"{where}.judge", judge, "judge", f"{where}.{key}", sampling.extra, judges))
    for key, model in measured.items():
        uses.append(ModelUse(key, model, "generate"))
        for name, block in settings.chosen.items():
            for part, sampling in block.answered().items():
                uses.append(ModelUse(key, model, "generate", f"benchmarks.{name}.{part}", sampling.extra))
    return uses
