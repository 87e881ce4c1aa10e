"""Public benchmarks as stages: questions → answers of each model → judges and checkers → scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ray_pipeline.graph.models import ModelSettings
from ray_pipeline.graph.stage import Stage
from ray_pipeline.stages.benchmark_answers import answers, floors
from ray_pipeline.stages.benchmark_judge import checks, judge_stages
from ray_pipeline.stages.benchmark_questions import BenchmarksSettings, questions_stage
from ray_pipeline.stages.benchmark_report import BenchmarksPage, report_stage
from ray_pipeline.stages.judge import FailureSettings


@dataclasses.dataclass(frozen=True)
class Answering:
    """A model that is measured, and the stage that makes its weights where this run trains it."""

    model: ModelSettings
    train: Stage | None = None


def benchmark_stages(
    settings: BenchmarksSettings,
    page: BenchmarksPage,
    failure: FailureSettings,
    judges: Mapping[str, ModelSettings],
    measured: Mapping[str, Answering],
    *,
    view: str = "report",
) -> list[Stage]:
    """All stages of the chosen benchmarks, the scores last.

    Raises:
        BenchmarkFileError, TemplateError, CheckersMissing: something that they need is not there.
    """
    questions = questions_stage(settings)
    answered = {
        name: answers(name, settings, failure, one.model, questions, one.train) for name, one in measured.items()
    }
    if settings.floors:
        answered["floors"] = floors(settings, questions)
    said = judge_stages(settings, failure, judges, questions, answered)
    if settings.ifeval is not None:
        said.append(checks(questions, answered))
    return [questions, *answered.values(), *said, report_stage(page, [questions, *answered.values(), *said], view=view)]
