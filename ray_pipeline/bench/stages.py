"""Public benchmarks as stages: questions → answers of each model → judges and checkers → scores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from ray_pipeline.bench.answers import answers, floors
from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.bench.ifeval.score import CheckersMissing, load_checkers
from ray_pipeline.bench.judging import checks, judge_stages
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
        BenchmarkFileError, TemplateError, CheckersMissing: something that they need is not there.
    """
    questions = questions_stage(settings)
    answered = {name: answers(name, settings, one.model, questions, one.train) for name, one in measured.items()}
    if settings.floors:
        answered["floors"] = floors(settings, questions)
    said = judge_stages(settings, judges, questions, answered)
    if settings.ifeval is not None:
        said.append(checks(questions, answered))
    return [questions, *answered.values(), *said, report_stage(page, [questions, *answered.values(), *said], view=view)]


def check_benchmarks(settings: BenchmarksSettings) -> None:
    """Everything that the chosen benchmarks need beside models: files, judge prompts and checkers.

    Raises:
        BenchmarkFileError: something is missing or wrong; the message names it and the remedy.
        TemplateError: a prompt file is not one.
    """
    if settings.mt_bench is not None:
        settings.mt_bench.judge_prompts()
    if settings.alpaca_eval is not None:
        settings.alpaca_eval.judge_prompt()
        settings.alpaca_eval.length_data()
    rows = question_rows(settings)
    if settings.ifeval is None:
        return
    try:
        known = load_checkers().registry
    except CheckersMissing as error:
        raise BenchmarkFileError(f"ifeval: {error}") from error
    for row in rows:
        for name in json.loads(row["checks"])["instructions"] if row["checks"] else ():
            if name not in known:
                raise BenchmarkFileError(
                    f"ifeval.prompts: prompt {row['question_id']} of {settings.ifeval.prompts} has the instruction "
                    f"{name}, and no checker knows it"
                )


def benchmark_uses(settings: BenchmarksSettings, measured: Mapping[str, str], judges: str = "models") -> list[ModelUse]:
    """The keys that choose a model.

    Args:
        measured: key of the configuration → the measured model's key under `models`.
        judges: the block that judging models are chosen from.
    """
    mt, alpaca, ifeval = settings.mt_bench, settings.alpaca_eval, settings.ifeval
    uses = []
    for name, block in (("mt_bench", mt), ("alpaca_eval", alpaca)):
        if block is not None:
            where = f"benchmarks.{name}"
            extra = block.asking.sampling.extra
            uses.append(ModelUse(f"{where}.judge", block.judge, "judge", f"{where}.asking.sampling", extra, judges))
    for key, model in measured.items():
        uses.append(ModelUse(key, model, "generate"))
        for name, answering in (("alpaca_eval", alpaca), ("ifeval", ifeval)):
            if answering is not None:
                sampling = f"benchmarks.{name}.sampling"
                uses.append(ModelUse(key, model, "generate", sampling, answering.sampling.extra))
    return uses
