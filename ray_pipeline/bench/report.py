"""The last stage of public benchmarks: scores of all models from the stored tables, and the page that shows them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from ray_pipeline.agents.templates import TemplateError
from ray_pipeline.agreement.panel import FAMILIES, family
from ray_pipeline.bench.alpaca_eval.judge import PairPreference
from ray_pipeline.bench.alpaca_eval.score import Annotation
from ray_pipeline.bench.answers import FLOOR
from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.bench.ifeval import score as ifeval
from ray_pipeline.bench.judging import answers_by_key
from ray_pipeline.bench.mt_bench import score as mt_bench
from ray_pipeline.bench.questions import (
    AlpacaEvalSettings,
    BenchmarksSettings,
    IfevalSettings,
    MtBenchSettings,
    alpaca_instruction,
    content_digests,
    ifeval_prompt,
    mt_question,
)
from ray_pipeline.bench.scores import (
    AlpacaEvalRules,
    Judge,
    MtBenchRules,
    Reading,
    Score,
    alpaca_eval_rates,
    ifeval_accuracies,
    mt_bench_grades,
    mt_bench_pairs,
)
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.stage import BadInput, Stage, StageResult, WholeInput, WholeWork
from ray_pipeline.stats.protocol import settings_text, short_name
from ray_pipeline.store.files import Folder, StoreError
from ray_pipeline.store.keys import canonical_json
from ray_pipeline.store.local import written_here
from ray_pipeline.store.schemas import READ_STATUSES

MAX_FLIP_RATE = 0.3
MAX_UNREAD = 0.05


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
    """A judge as the protocol and the warnings know it; `setup` holds settings that the published judges have not."""

    shown: str
    identity: str
    setup: str = ""


class BenchmarksPage(Settings):
    """What the page says beside the tables; kept in the manifest, so that it can be written anew."""

    run_name: str
    benchmarks: BenchmarksSettings
    models: dict[str, MeasuredModel]
    judges: dict[str, JudgingModel] = Field(default_factory=dict)


def judging_model(model: ModelSettings) -> JudgingModel:
    """Identity of a judge: the model alone where it is asked as it is, and what changes its replies beside that."""
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
        stages: the questions, all answers, and all that was said of them.
        view: folder of the run that points at it.

    Raises:
        BenchmarkFileError: a file of the length control is not there.
    """
    alpaca = page.benchmarks.alpaca_eval
    sources = {} if alpaca is None else {"gamed": alpaca.gamed, "difficulties": alpaca.difficulties}
    return Stage(
        name=name,
        group=name,
        view=view,
        work=WholeWork(function=write_scores, settings=page),
        config=page.model_dump(mode="json", exclude={"run_name"}),
        inputs={stage.name: stage for stage in stages},
        external=content_digests({key: source for key, source in sources.items() if source is not None}),
    )


def write_scores(given: WholeInput) -> dict[str, Any]:
    try:
        with written_here(given.folder) as folder:
            scores = _build(given.inputs, given.settings, folder)
    except (BenchmarkFileError, TemplateError, ifeval.CheckersMissing) as error:
        raise BadInput(str(error)) from error
    from ray_pipeline.bench.page import figure

    for score in scores:
        given.log(f"{score.model}: {score.name.text} ({score.metric}) {figure(vars(score))}")
    headline = {f"{s.model}: {s.benchmark} {s.metric}": s.value for s in scores}
    return {"scores": headline}


def rewrite_page(run: Run) -> Folder:
    """The page anew, from the benchmarks that are judged; returns its folder.

    Raises:
        StoreError: no question was answered yet.
    """
    if not any(name.startswith(("bench-judge-", "bench-checks")) for name in run.results):
        raise StoreError(f"{run.folder.location} has judged no benchmark yet; run the same command again first")
    page = BenchmarksPage.model_validate(run.manifest["report"])
    done = "benchmarks" in run.results
    name = run.manifest["stages"]["benchmarks"]["path"] if done else f"report-{run.manifest['config_digest']}"
    try:
        with written_here(run.folder / name) as folder:
            _build(run.results, page, folder)
    except (BenchmarkFileError, TemplateError, ifeval.CheckersMissing) as error:
        raise StoreError(str(error)) from error
    return run.show("report", name)


# --- scores from tables -----------------------------------------------------------------------------------------------


class _Tables:
    """The rows of a run by kind, read once."""

    def __init__(self, results: Mapping[str, StageResult]) -> None:
        self._results = [result for _, result in sorted(results.items())]

    def rows(self, kind: str) -> list[dict[str, Any]] | None:
        """None where no stage with such a table is done."""
        tables = [r.table(kind).read_all() for r in self._results if kind in r.tables]
        return pa.concat_tables(tables).to_pylist() if tables else None

    @functools.cached_property
    def questions(self) -> list[dict[str, Any]]:
        rows = self.rows("bench_questions") or []
        return sorted(rows, key=lambda row: (row["benchmark"], row["position"]))

    @functools.cached_property
    def answers(self) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
        return answers_by_key(
            [r.table("bench_answers").read_all() for r in self._results if "bench_answers" in r.tables]
        )

    def of(self, benchmark: str) -> list[dict[str, Any]]:
        return [q for q in self.questions if q["benchmark"] == benchmark]


def _build(results: Mapping[str, StageResult], page: BenchmarksPage, folder: Path) -> list[Score]:
    from ray_pipeline.bench.table import BenchmarkPage, write_benchmarks

    tables, chosen = _Tables(results), page.benchmarks
    names = [*page.models, *(FLOOR + floor for floor in chosen.floors)]
    scores: list[Score] = []
    readings: list[Reading] = []
    categories: list[dict[str, Any]] = []
    types: list[dict[str, Any]] = []
    instructions: list[pa.Table] = []
    if chosen.mt_bench is not None:
        rules = _mt_rules(chosen.mt_bench, page, tables)
        made, rows, read = _mt_bench(chosen.mt_bench, rules, tables, names)
        scores, categories, readings = scores + made, rows, readings + read
    if chosen.alpaca_eval is not None and (said := tables.rows("bench_preferences")) is not None:
        for name in names:
            rates, table, how = alpaca_eval_rates(
                name, _annotations(tables, said, name), _alpaca_rules(chosen.alpaca_eval, page)
            )
            scores, readings = scores + rates, [*readings, how]
            instructions.append(table)
    if chosen.ifeval is not None and (checked := tables.rows("bench_checks")) is not None:
        made, types, read = _ifeval(chosen.ifeval, page, tables, checked, names)
        scores, readings = scores + made, readings + read
    shown = BenchmarkPage(
        name=page.run_name,
        models=names,
        scores=scores,
        readings=readings,
        facts=_facts(page),
        warnings=list(_warnings(page, scores, readings)),
        categories=categories,
        types=types,
        instructions=pa.concat_tables(instructions) if instructions else None,
    )
    write_benchmarks(shown, folder)
    return scores


def _judge(page: BenchmarksPage, key: str) -> Judge:
    return Judge(page.judges[key].identity, page.judges[key].setup)


def _mt_rules(settings: MtBenchSettings, page: BenchmarksPage, tables: _Tables) -> MtBenchRules:
    return MtBenchRules(
        questions=[mt_question(q) for q in tables.of("mt_bench")],
        prompts=settings.judge_prompts(),
        asking=settings.asking,
        judge=_judge(page, settings.judge),
        reference=settings.reference_name,
        answer_tokens=settings.answer_tokens,
        temperatures=settings.temperatures,
        draws=page.benchmarks.draws,
        seed=page.benchmarks.seed,
    )


def _mt_bench(
    settings: MtBenchSettings, rules: MtBenchRules, tables: _Tables, names: Sequence[str]
) -> tuple[list[Score], list[dict[str, Any]], list[Reading]]:
    scores: list[Score] = []
    categories: list[dict[str, Any]] = []
    readings: list[Reading] = []
    columns = ("category", "turn", "parse_status", "contradictory", "raw")
    rated, compared = tables.rows("bench_ratings"), tables.rows("bench_comparisons")
    for name in names if rated is not None else ():
        ratings = [
            mt_bench.TurnRating(question_id=int(r["question_id"]), score=r["score"], **{c: r[c] for c in columns})
            for r in rated or ()
            if r["model"] == name
        ]
        made, rows, how = mt_bench_grades(name, ratings, rules)
        scores, categories, readings = scores + made, categories + rows, [*readings, how]
    for name in [n for n in names if n != settings.against] if compared is not None else ():
        pairs = [
            mt_bench.TurnComparison(
                question_id=int(r["question_id"]),
                order=r["order"],
                choice=r["choice"],
                **{c: r[c] for c in columns},
            )
            for r in compared or ()
            if r["model"] == name
        ]
        made, rows, how = mt_bench_pairs(name, settings.against, pairs, rules)
        scores, categories, readings = scores + made, [*categories, *rows], [*readings, how]
    return scores, categories, readings


@functools.lru_cache(maxsize=4)
def _length_data(settings_text: str) -> Any:
    return AlpacaEvalSettings.model_validate_json(settings_text).length_data()


def _alpaca_rules(settings: AlpacaEvalSettings, page: BenchmarksPage) -> AlpacaEvalRules:
    return AlpacaEvalRules(
        prompt=settings.judge_prompt(),
        asking=settings.asking,
        judge=_judge(page, settings.judge),
        order=settings.order,
        order_seed=settings.order_seed,
        reference=settings.reference_name,
        answers=settings_text(**settings.sampling.model_dump()),
        length_data=_length_data(settings.model_dump_json()),
        published_instructions=settings.published_instructions,
        draws=page.benchmarks.draws,
        seed=page.benchmarks.seed,
    )


def _annotations(tables: _Tables, said: Sequence[Mapping[str, Any]], model: str) -> list[Annotation]:
    """Every instruction in the order of the file, with what was said of the model's output; without an output, none."""
    asked: dict[str, dict[Any, PairPreference]] = {}
    for row in said:
        if row["model"] == model:
            preference = PairPreference(row["first"], row["method"], row["label_mass"], row["parse_status"], row["raw"])
            asked.setdefault(row["question_id"], {})[row["place"]] = preference
    return [
        Annotation(
            alpaca_instruction(question),
            tables.answers["alpaca_eval", question["question_id"], model][0]["answer"],
            asked.get(question["question_id"], {}),
        )
        for question in tables.of("alpaca_eval")
    ]


def _ifeval(
    settings: IfevalSettings,
    page: BenchmarksPage,
    tables: _Tables,
    checked: Sequence[Mapping[str, Any]],
    names: Sequence[str],
) -> tuple[list[Score], list[dict[str, Any]], list[Reading]]:
    prompts = [ifeval_prompt(q) for q in tables.of("ifeval")]
    scores: list[Score] = []
    types: list[dict[str, Any]] = []
    readings: list[Reading] = []
    for name in names:
        verdicts = [
            ifeval.IfevalVerdict(
                int(r["question_id"]), tuple(r["strict"]), tuple(r["loose"]), r["answered"], r["chance"]
            )
            for r in checked
            if r["model"] == name
        ]
        made, rows, how = ifeval_accuracies(
            name,
            prompts,
            verdicts,
            settings_text(**settings.sampling.model_dump()),
            draws=page.benchmarks.draws,
            seed=page.benchmarks.seed,
        )
        scores, types, readings = scores + made, types + rows, [*readings, how]
    return scores, types, readings


# --- what a reader should know ----------------------------------------------------------------------------------------


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
    yield from _floor_warnings(scores)


def _floor_warnings(scores: Sequence[Score]) -> Iterator[str]:
    """A judged benchmark on which a floor does as well as a model measures its judge's weakness."""
    judged = [s for s in scores if s.benchmark != "ifeval" and s.value is not None]
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
