"""Verdicts on the answers to public benchmarks: by judge models, one stage each, and by IFEval's checkers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ray_pipeline.bench.alpaca_eval.judge import PreferenceAsking
from ray_pipeline.bench.alpaca_eval.questions import OrderRule, instruction_of
from ray_pipeline.bench.alpaca_eval.score import annotate
from ray_pipeline.bench.ifeval.checkers import Checkers, CheckersMissing, checker_version, load_checkers
from ray_pipeline.bench.ifeval.questions import prompt_of
from ray_pipeline.bench.ifeval.score import UnknownInstruction, check
from ray_pipeline.bench.judge_prompts import BenchPrompt, PreferencePrompt
from ray_pipeline.bench.mt_bench import score as mt_bench
from ray_pipeline.bench.mt_bench.judge import BenchAsking, Conversation
from ray_pipeline.bench.mt_bench.questions import question_of
from ray_pipeline.bench.questions import BenchmarksSettings
from ray_pipeline.bench.schemas import BENCH_CHECKS, BENCHMARK_TABLES
from ray_pipeline.bench.tables import answers_by_key
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, reply_status
from ray_pipeline.graph.stage import BadInput, ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.schemas import to_table


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

    @property
    def tables(self) -> list[str]:
        """Kinds of table that this judge fills, in order."""
        modes = () if self.mt_bench is None else self.mt_bench.modes
        kinds = {"bench_ratings": "single" in modes, "bench_comparisons": "pairwise" in modes}
        return [
            kind for kind, wanted in (kinds | {"bench_preferences": self.alpaca_eval is not None}).items() if wanted
        ]


class _Judgement(NamedTuple):
    """One model's answers to a question, with what they are compared with in a pairwise judgement of MT-Bench."""

    prompt_id: str
    question: Row
    model: str
    table: str
    answers: list[Row]
    against: list[Row]


def _judgements(shard: ShardTables, settings: _Judging) -> Iterator[_Judgement]:
    """Per table ordered by question, then by the models' names."""
    answers = answers_by_key(shard.under("answers/"))
    models = sorted({model for _, _, model in answers})
    questions = shard.rows("questions")
    for table in settings.tables:
        benchmark = "alpaca_eval" if table == "bench_preferences" else "mt_bench"
        against = settings.mt_bench.against if settings.mt_bench and table == "bench_comparisons" else None
        for question in questions:
            if question["benchmark"] == benchmark:
                key = benchmark, question["question_id"]
                other = [] if against is None else answers[*key, against]
                for model in models:
                    if model != against:
                        yield _Judgement(question["prompt_id"], question, model, table, answers[*key, model], other)


async def _judge(engine: ChatEngine, settings: _Judging, item: _Judgement) -> Outcome:
    question, rows = item.question, []
    if settings.alpaca_eval is not None and item.table == "bench_preferences":
        alpaca = settings.alpaca_eval
        annotation = await annotate(
            engine,
            instruction_of(question),
            item.answers[0]["answer"],
            alpaca.prompt,
            alpaca.asking,
            alpaca.order,
            alpaca.order_seed,
        )
        rows = [{"place": place, **vars(preference)} for place, preference in annotation.asked.items()]
    elif settings.mt_bench is not None:
        mt, asked, answers = settings.mt_bench, question_of(question), _conversation(item.answers)
        if item.table == "bench_ratings":
            rows = [vars(r) for r in await mt_bench.grade(engine, asked, answers, mt.prompts, mt.asking)]
        else:
            other = _conversation(item.against)
            comparisons = await mt_bench.compare(engine, asked, answers, other, mt.prompts, mt.asking)
            rows = [{"against": mt.against, **vars(c)} for c in comparisons]
    replies = reply_status(f"the benchmark judge {settings.judge}", *(row["parse_status"] for row in rows))
    return Outcome({item.table: [{**row, **_key(question, item.model)} for row in rows]}, replies)


_ROLES = {
    "bench_ratings": "benchmark-judge/mt_bench",
    "bench_comparisons": "benchmark-judge/mt_bench/pairwise",
    "bench_preferences": "benchmark-judge/alpaca_eval",
}

JUDGE = Asking(
    tables={kind: BENCHMARK_TABLES[kind] for kind in _ROLES},
    items=_judgements,
    ask=_judge,
    role=lambda settings, item: _ROLES[item.table],
)


def judge_stages(
    settings: BenchmarksSettings,
    judges: Mapping[str, ModelSettings],
    questions: Stage,
    answered: Mapping[str, Stage],
) -> list[Stage]:
    """One stage per judge model, over all models' answers.

    Args:
        answered: stages of answers by name.

    Raises:
        BenchmarkFileError, TemplateError: a prompt file cannot be used.
    """
    stages = []
    for key in settings.judges:
        mt, alpaca = settings.mt_bench, settings.alpaca_eval
        judging = _Judging(
            judge=key,
            mt_bench=_MtJudging.part_of(mt, prompts=mt.judge_prompts()) if mt and mt.judge == key else None,
            alpaca_eval=_AlpacaJudging.part_of(alpaca, prompt=alpaca.judge_prompt())
            if alpaca and alpaca.judge == key
            else None,
        )
        asking = dataclasses.replace(JUDGE, tables={kind: JUDGE.tables[kind] for kind in judging.tables})
        inputs = {"questions": questions, **{f"answers/{name}": stage for name, stage in answered.items()}}
        stages.append(asking.stage(f"bench-judge-{key}", judging, judges[key], inputs, group="bench-judge"))
    return stages


def _key(question: Row, model: str) -> Row:
    return {**{name: question[name] for name in ("benchmark", "question_id", "prompt_id")}, "model": model}


def _conversation(rows: Sequence[Row]) -> Conversation:
    return Conversation((rows[0]["answer"], rows[1]["answer"]), (rows[0]["finish_reason"], rows[1]["finish_reason"]))


# --- IFEval -----------------------------------------------------------------------------------------------------------


def checks(questions: Stage, answered: Mapping[str, Stage]) -> Stage:
    """IFEval's verdicts on all answers. Raises CheckersMissing if the checkers are not installed."""
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
        BadInput: the checkers are missing on this node, or an instruction is unknown to them.
    """
    questions = [q for q in given.tables["questions"].to_pylist() if q["benchmark"] == "ifeval"]
    answered = answers_by_key(ShardTables(given.tables, given.facts).under("answers/"))
    rows: list[Row] = []
    if questions:
        prompts = [prompt_of(q) for q in questions]
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
