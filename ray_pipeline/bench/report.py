"""The last stage of public benchmarks: scores of all models from the stored tables, and the page that shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from ray_pipeline.agents.templates import TemplateError
from ray_pipeline.agreement.panel import FAMILIES, family
from ray_pipeline.bench.answers import FLOOR
from ray_pipeline.bench.benchmark import Judge, Measurement, Reading, Score
from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.bench.page import figure
from ray_pipeline.bench.questions import content_digests
from ray_pipeline.bench.settings import BenchmarksSettings
from ray_pipeline.bench.table import BenchmarkPage, write_benchmarks
from ray_pipeline.bench.tables import Tables
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.engines.usage import Usage
from ray_pipeline.evaluate.first_screen import first_screen
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.stage import BadInput, Stage, StageResult, WholeInput, WholeWork
from ray_pipeline.stats.protocol import short_name
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import canonical_json
from ray_pipeline.store.local import written_here
from ray_pipeline.store.schemas import READ_STATUSES, cut_off

MAX_FLIP_RATE = 0.3
#: Kinds of table that have no verdicts.
_UNJUDGED = {"bench_questions", "bench_answers"}
MAX_UNREAD = 0.05
MAX_TRUNCATED = 0.1


class MeasuredModel(Settings):
    """A model of the table.

    Attributes:
        shown: its name for readers (for a policy, that of the model it was trained from).
        identity: of its weights; empty where they are made in this run.
        curating: names of the models whose judgements made its training data.
    """

    shown: str
    identity: str = ""
    curating: tuple[str, ...] = ()


class JudgingModel(Settings):
    """A judge in protocol and warnings; `setup` contains settings that the published judges do not have."""

    shown: str
    identity: str
    setup: str = ""


class BenchmarksPage(Settings):
    """Content of the page beside the tables; stored in the manifest, so that it can be rewritten."""

    run_name: str
    benchmarks: BenchmarksSettings
    models: dict[str, MeasuredModel]
    judges: dict[str, JudgingModel] = Field(default_factory=dict)


def judging_model(model: ModelSettings) -> JudgingModel:
    """Identity of a judge: the model, and whatever else changes its replies."""
    weights = model.weights()
    identity = weights.pop("model")
    semantics = model.semantics()
    if model.endpoint is not None and not semantics["extra_body"] and not semantics["omit"]:
        semantics = {}
    setup = canonical_json({**weights, **semantics}) if weights or semantics else ""
    return JudgingModel(shown=model.shown, identity=identity, setup=setup)


def report_stage(page: BenchmarksPage, stages: Sequence[Stage], *, view: str, name: str = "benchmarks") -> Stage:
    """The scores and their page.

    Args:
        stages: the questions, all answers, and all verdicts on them.
        view: folder of the run that points at it.

    Raises:
        BenchmarkFileError: a file of the length control is missing.
    """
    return Stage(
        name=name,
        group=name,
        view=view,
        role="scores",
        work=WholeWork(function=write_scores, settings=page),
        config=page.decisive(exclude={"run_name"}),
        inputs={stage.name: stage for stage in stages},
        external=content_digests(page.benchmarks.score_sources()),
    )


def write_scores(given: WholeInput) -> dict[str, Any]:
    try:
        with written_here(given.folder) as folder:
            scores = _build(given.inputs, given.settings, folder)
    except (BenchmarkFileError, TemplateError) as error:
        raise BadInput(str(error)) from error
    for score in scores:
        given.log(f"{score.model}: {score.name.text} ({score.metric}) {figure(vars(score))}")
    headline = {f"{s.model}: {s.benchmark} {s.metric}": s.value for s in scores}
    return {"scores": headline}


def rewrite_page(run: Run) -> Folder:
    """Rewrite the page from the benchmarks judged so far; returns its folder.

    Raises:
        StoreError: no question was answered yet.
    """
    kinds = {kind for result in run.results.values() for kind in result.tables if kind.startswith("bench_")}
    if not kinds - _UNJUDGED:
        raise StoreError(f"{run.folder.location} has judged no benchmark yet; run the same command again first")
    page, name = BenchmarksPage.model_validate(run.page), run.page_folder("benchmarks")
    try:
        with written_here(run.folder / name) as folder:
            _build(run.results, page, folder)
    except (BenchmarkFileError, TemplateError) as error:
        raise StoreError(str(error)) from error
    return run.show("report", name)


def _build(results: Mapping[str, StageResult], page: BenchmarksPage, folder: Path) -> list[Score]:
    chosen, tables = page.benchmarks, Tables(results)
    names = [*page.models, *(FLOOR + floor for floor in chosen.floors)]
    judges = {key: Judge(judge.identity, judge.setup) for key, judge in page.judges.items()}
    shown = BenchmarkPage(name=page.run_name, models=names, facts=_facts(page))
    for name, block in chosen.chosen.items():
        part = block.scores(Measurement(name, tables, names, judges, chosen.draws, chosen.seed))
        shown.scores += part.scores
        shown.readings += part.readings
        for table, rows in part.tables.items():
            shown.tables[f"{name}_{table}"] = rows
            if table in block.titles:
                shown.titles[f"{name}_{table}"] = block.titles[table]
    shown.answers = first_screen(
        f"public benchmarks: {', '.join(chosen.chosen)}",
        models={name: model.shown for name, model in page.models.items()},
        judges={"": {key: judge.shown for key, judge in page.judges.items()}},
        amounts=[
            *((len(tables.rows(f"bench_{kind}")), kind) for kind in ("questions", "answers")),
            (sum(cut for cut, _ in _cut_answers(tables).values()), "answers cut off"),
        ],
        usage=sum((result.usage for result in results.values()), Usage()),
    )
    shown.warnings += _warnings(page, shown.scores, shown.readings)
    shown.warnings += [
        f"{name}, {model}: {cut} of {answered} answers were cut off, and were judged as they are."
        for (name, model), (cut, answered) in sorted(_cut_answers(tables).items())
        if cut / answered > MAX_TRUNCATED
    ]
    write_benchmarks(shown, folder)
    return shown.scores


def _cut_answers(tables: Tables) -> dict[tuple[str, str], tuple[int, int]]:
    """By benchmark and model, how many answers were cut off, and how many there are."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for (name, _, model), turns in tables.answers.items():
        ends = [turn["finish_reason"] for turn in turns if turn["finish_reason"] != "skipped"]
        cut, answered = found.get((name, model), (0, 0))
        found[name, model] = cut + sum(cut_off(pa.array(ends, pa.string())).to_pylist()), answered + len(ends)
    return found


# --- warnings ---------------------------------------------------------------------------------------------------------


def _facts(page: BenchmarksPage) -> dict[str, str]:
    facts = {f"model {name}": m.shown + (f" ({short_name(m.identity)})" if m.identity else ", trained in this run")
             for name, m in page.models.items()}  # fmt: skip
    facts |= {f"judge {key}": f"{j.shown} ({short_name(j.identity)})" for key, j in page.judges.items()}
    facts |= {f"file {key}": source for key, source in page.benchmarks.sources().items()}
    return {**facts, "seed": str(page.benchmarks.seed), "bootstrap samples": str(page.benchmarks.draws)}


def _warnings(page: BenchmarksPage, scores: Sequence[Score], readings: Sequence[Reading]) -> Iterator[str]:
    for key, judge in page.judges.items():
        for name, model in page.models.items():
            if model.identity == judge.identity:
                yield f"Judge {key} is the measured model {name}: judges prefer their own answers."
            elif family(judge.shown, FAMILIES) == family(model.shown, FAMILIES):
                yield (
                    f"Judge {key} ({judge.shown}) is of the same family as {name} ({model.shown}): judges prefer "
                    "answers like their own."
                )
            if judge.shown in model.curating:
                yield f"Judge {key} ({judge.shown}) also curated the data of {name}: it may prefer what it has taught."
    for reading in readings:
        if reading.flip_rate is not None and reading.flip_rate > MAX_FLIP_RATE:
            yield (
                f"{reading.benchmark}, {reading.model}: the judge prefers another answer in "
                f"{100 * reading.flip_rate:.0f} % of the pairs when the order is swapped."
            )
        asked = sum(reading.statuses.values())
        unread = asked - sum(reading.statuses.get(status, 0) for status in (*READ_STATUSES, "answered"))
        if asked and unread / asked > MAX_UNREAD:
            yield f"{reading.benchmark}, {reading.model}: {unread} of {asked} could not be read."
    yield from _floor_warnings(page.benchmarks, scores)


def _floor_warnings(benchmarks: BenchmarksSettings, scores: Sequence[Score]) -> Iterator[str]:
    """A judged benchmark on which a floor does as well as a model measures its judge's weakness."""
    judged = [s for s in scores if benchmarks.chosen[s.benchmark].judged() and s.value is not None]
    for floor in (s for s in judged if s.model.startswith(FLOOR)):
        beaten = [
            s.model
            for s in judged
            if (s.benchmark, s.metric) == (floor.benchmark, floor.metric)
            and not s.model.startswith(FLOOR)
            and (s.value or 0.0) <= (floor.value or 0.0)
        ]
        if beaten:
            yield (
                f"{floor.benchmark} {floor.metric}: the floor {floor.model.removeprefix(FLOOR)}, which knows nothing, "
                f"scores as high as {', '.join(beaten)} or higher."
            )
