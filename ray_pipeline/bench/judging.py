"""What is said of the answers to public benchmarks: by judging models, one stage a model, and by IFEval's checkers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from ray_pipeline.bench.alpaca_eval.judge import PreferenceAsking
from ray_pipeline.bench.alpaca_eval.score import OrderRule, annotate
from ray_pipeline.bench.ifeval.score import (
    Checkers,
    CheckersMissing,
    UnknownInstruction,
    check,
    checker_version,
    load_checkers,
)
from ray_pipeline.bench.judge_prompts import BenchPrompt, PreferencePrompt
from ray_pipeline.bench.mt_bench import score as mt_bench
from ray_pipeline.bench.mt_bench.judge import BenchAsking, Conversation
from ray_pipeline.bench.questions import (
    BenchmarksSettings,
    alpaca_instruction,
    ifeval_prompt,
    mt_question,
)
from ray_pipeline.bench.schemas import (
    BENCH_CHECKS,
    BENCH_COMPARISONS,
    BENCH_PREFERENCES,
    BENCH_RATINGS,
)
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.gather import all_of
from ray_pipeline.graph.llm_stage import llm_stage
from ray_pipeline.graph.stage import BadInput, ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.schemas import READ_STATUSES, to_table
from ray_pipeline.store.settings import Settings

#: Statuses that say nothing about the judge: it was not asked, or could not be.
_NOT_ITS_FAULT = ("too_long", "skipped")


class _MtJudging(Settings):
    prompts: dict[str, BenchPrompt]
    asking: BenchAsking
    modes: tuple[Literal["single", "pairwise"], ...]
    against: str


class _AlpacaJudging(Settings):
    prompt: PreferencePrompt
    asking: PreferenceAsking
    order: OrderRule
    order_seed: int


class _Judging(Settings):
    judge: str
    mt_bench: _MtJudging | None
    alpaca_eval: _AlpacaJudging | None


#: (benchmark, question_id, model) → the answers to its turns.
_Answers = Mapping[tuple[str, str, str], list[dict[str, Any]]]


def judge_stages(
    settings: BenchmarksSettings,
    failure: FailureSettings,
    judges: Mapping[str, ModelSettings],
    questions: Stage,
    answered: Mapping[str, Stage],
) -> list[Stage]:
    """One stage a judging model, over all models' answers.

    Args:
        answered: name → stage of answers.

    Raises:
        BenchmarkFileError, TemplateError: a prompt file cannot be used.
    """
    stages = []
    for key in settings.judges:
        mt, alpaca = settings.mt_bench, settings.alpaca_eval
        given = _Judging(
            judge=key,
            mt_bench=None
            if mt is None or mt.judge != key
            else _MtJudging(prompts=mt.judge_prompts(), asking=mt.asking, modes=mt.modes, against=mt.against),
            alpaca_eval=None
            if alpaca is None or alpaca.judge != key
            else _AlpacaJudging(
                prompt=alpaca.judge_prompt(), asking=alpaca.asking, order=alpaca.order, order_seed=alpaca.order_seed
            ),
        )
        tables: list[str] = []
        if given.mt_bench is not None:
            tables += ["bench_ratings"] if "single" in given.mt_bench.modes else []
            tables += ["bench_comparisons"] if "pairwise" in given.mt_bench.modes else []
        tables += ["bench_preferences"] if given.alpaca_eval is not None else []
        stages.append(
            llm_stage(
                f"bench-judge-{key}",
                judge_shard,
                tuple(tables),
                given,
                judges[key],
                failure,
                {"questions": questions, **{f"answers/{name}": stage for name, stage in answered.items()}},
                group="bench-judge",
            )
        )
    return stages


def answers_by_key(tables: Sequence[pa.Table]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Answers of all models by (benchmark, question_id, model), each list in the order of its turns."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for table in tables:
        for row in table.to_pylist():
            found.setdefault((row["benchmark"], row["question_id"], row["model"]), []).append(row)
    return {key: sorted(rows, key=lambda row: row["turn"]) for key, rows in found.items()}


def _answers(given: ShardInput) -> _Answers:
    return answers_by_key([given.tables[role] for role in sorted(given.tables) if role.startswith("answers/")])


async def judge_shard(given: ShardInput) -> ShardOutput:
    """Ratings, comparisons and preferences of one shard, ordered by question, then by the models' names."""
    settings: _Judging = given.settings
    answered = _answers(given)
    models = sorted({model for _, _, model in answered})
    questions = given.tables["questions"].to_pylist()
    mt_questions = [q for q in questions if q["benchmark"] == "mt_bench" and settings.mt_bench is not None]
    tables: dict[str, pa.Table] = {}
    if settings.mt_bench is not None and "single" in settings.mt_bench.modes:
        rows = await all_of(_rate(given, settings.mt_bench, q, m, answered) for q in mt_questions for m in models)
        tables["bench_ratings"] = to_table([r for found in rows for r in found], BENCH_RATINGS)
    if settings.mt_bench is not None and "pairwise" in settings.mt_bench.modes:
        others = [m for m in models if m != settings.mt_bench.against]
        rows = await all_of(_compare(given, settings.mt_bench, q, m, answered) for q in mt_questions for m in others)
        tables["bench_comparisons"] = to_table([r for found in rows for r in found], BENCH_COMPARISONS)
    if settings.alpaca_eval is not None:
        mine = [q for q in questions if q["benchmark"] == "alpaca_eval"]
        rows = await all_of(_prefer(given, settings.alpaca_eval, q, m, answered) for q in mine for m in models)
        tables["bench_preferences"] = to_table([r for found in rows for r in found], BENCH_PREFERENCES)
    return ShardOutput(tables)


def _key(question: Mapping[str, Any], model: str) -> dict[str, Any]:
    return {**{name: question[name] for name in ("benchmark", "question_id", "prompt_id")}, "model": model}


def _conversation(rows: Sequence[Mapping[str, Any]]) -> Conversation:
    return Conversation((rows[0]["answer"], rows[1]["answer"]), (rows[0]["finish_reason"], rows[1]["finish_reason"]))


def _seen(given: ShardInput, judge: str, status: str) -> None:
    if status not in _NOT_ITS_FAULT:
        given.watch(f"the benchmark judge {judge}", status in READ_STATUSES)


async def _rate(
    given: ShardInput, settings: _MtJudging, question: Mapping[str, Any], model: str, answered: _Answers
) -> list[dict[str, Any]]:
    assert given.engine is not None
    said = await mt_bench.grade(
        given.engine.bound(question["prompt_id"], "benchmark-judge/mt_bench"),
        mt_question(question),
        _conversation(answered["mt_bench", question["question_id"], model]),
        settings.prompts,
        settings.asking,
    )
    given.tick(len(said))
    for r in said:
        _seen(given, given.settings.judge, r.parse_status)
    return [
        {
            **_key(question, model),
            "category": r.category,
            "turn": r.turn,
            "score": r.score,
            "parse_status": r.parse_status,
            "contradictory": r.contradictory,
            "raw": r.raw,
        }
        for r in said
    ]


async def _compare(
    given: ShardInput, settings: _MtJudging, question: Mapping[str, Any], model: str, answered: _Answers
) -> list[dict[str, Any]]:
    assert given.engine is not None
    said = await mt_bench.compare(
        given.engine.bound(question["prompt_id"], "benchmark-judge/mt_bench/pairwise"),
        mt_question(question),
        _conversation(answered["mt_bench", question["question_id"], model]),
        _conversation(answered["mt_bench", question["question_id"], settings.against]),
        settings.prompts,
        settings.asking,
    )
    given.tick(len(said))
    for c in said:
        _seen(given, given.settings.judge, c.parse_status)
    return [
        {
            **_key(question, model),
            "against": settings.against,
            "category": c.category,
            "turn": c.turn,
            "order": c.order,
            "choice": c.choice,
            "parse_status": c.parse_status,
            "contradictory": c.contradictory,
            "raw": c.raw,
        }
        for c in said
    ]


async def _prefer(
    given: ShardInput, settings: _AlpacaJudging, question: Mapping[str, Any], model: str, answered: _Answers
) -> list[dict[str, Any]]:
    assert given.engine is not None
    found = await annotate(
        given.engine.bound(question["prompt_id"], "benchmark-judge/alpaca_eval"),
        alpaca_instruction(question),
        answered["alpaca_eval", question["question_id"], model][0]["answer"],
        settings.prompt,
        settings.asking,
        settings.order,
        settings.order_seed,
    )
    given.tick(1)
    for said in found.asked.values():
        _seen(given, given.settings.judge, said.parse_status)
    return [
        {
            **_key(question, model),
            "place": place,
            "first": said.first,
            "method": said.method,
            "label_mass": said.label_mass,
            "parse_status": said.parse_status,
            "raw": said.raw,
        }
        for place, said in found.asked.items()
    ]


# --- IFEval -----------------------------------------------------------------------------------------------------------


def checks(questions: Stage, answered: Mapping[str, Stage]) -> Stage:
    """IFEval's verdicts on all answers. Raises CheckersMissing where the checkers are not installed."""
    return Stage(
        name="bench-checks",
        group="bench-judge",
        work=ShardWork(function=check_shard, tables=("bench_checks",)),
        config={"checkers": checker_version()},
        inputs={"questions": questions, **{f"answers/{name}": stage for name, stage in answered.items()}},
    )


@functools.cache
def _checkers() -> Checkers:
    return load_checkers()


def check_shard(given: ShardInput) -> ShardOutput:
    """The verdicts of one shard, ordered by model, then as the questions are.

    Raises:
        BadInput: the checkers are missing on this node, or do not know an instruction.
    """
    questions = [q for q in given.tables["questions"].to_pylist() if q["benchmark"] == "ifeval"]
    answered = _answers(given)
    rows: list[dict[str, Any]] = []
    if questions:
        prompts = [ifeval_prompt(q) for q in questions]
        for model in sorted({model for _, _, model in answered}):
            texts = {p.key: answered["ifeval", str(p.key), model][0]["answer"] for p in prompts}
            try:
                found = check(prompts, texts, _checkers())
            except (CheckersMissing, UnknownInstruction) as error:
                raise BadInput(str(error)) from error
            rows += [
                {
                    **_key(question, model),
                    "strict": list(v.strict),
                    "loose": list(v.loose),
                    "answered": v.answered,
                    "chance": v.chance,
                }
                for question, v in zip(questions, found, strict=True)
            ]
            given.tick(len(found))
    return ShardOutput({"bench_checks": to_table(rows, BENCH_CHECKS)})
