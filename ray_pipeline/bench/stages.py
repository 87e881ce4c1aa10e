"""Public benchmarks as stages: questions → answers of each model → judges and checkers → scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ray_pipeline.bench.answers import answers, floors
from ray_pipeline.bench.judging import check_stages, judge_stages
from ray_pipeline.bench.questions import questions_stage
from ray_pipeline.bench.report import BenchmarksPage, report_stage
from ray_pipeline.bench.settings import BenchmarksSettings
from ray_pipeline.engines.models import ModelSettings
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
        BenchmarkFileError, TemplateError: something that they need is missing.
    """
    questions = questions_stage(settings)
    answered = {name: answers(name, settings, one.model, questions, one.train) for name, one in measured.items()}
    if settings.floors:
        answered["floors"] = floors(settings, questions)
    inputs = {"questions": questions, **{f"answers/{name}": stage for name, stage in answered.items()}}
    stages = [*inputs.values(), *judge_stages(settings, judges, inputs), *check_stages(settings, inputs)]
    return [*stages, report_stage(page, stages, view=view)]
