"""Verdicts on the answers to benchmarks: one stage per judge model, and one per benchmark that a program checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ray_pipeline.bench.benchmark import Checking, Judging
from ray_pipeline.bench.files import BenchmarkFileError
from ray_pipeline.bench.settings import BenchmarksSettings
from ray_pipeline.bench.tables import answers_by_key, question_key
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, Row, ShardTables, reply_status
from ray_pipeline.graph.stage import BadInput, ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.schemas import TABLES, to_table


def _answers(shard: ShardTables) -> dict[tuple[str, str, str], list[Row]]:
    return answers_by_key(row for table in shard.under("answers/") for row in table.to_pylist())


class _Judging(Settings):
    """A judge, and by benchmark what it judges (`Judging`), in order."""

    judge: str
    parts: dict[str, Any]

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        # Fingerprints of stored runs have these two, null where this judge does not judge them.
        parts = {name: part.decisive() for name, part in self.parts.items()}
        return {"judge": self.judge, "mt_bench": None, "alpaca_eval": None, **parts}


class _Judgement(NamedTuple):
    """One model's answers to a question, and those that they are compared with, if any."""

    prompt_id: str
    question: Row
    model: str
    table: str
    answers: list[Row]
    against: list[Row]


def _judgements(shard: ShardTables, settings: _Judging) -> Iterator[_Judgement]:
    """Per table ordered by question, then by the models' names."""
    answers = _answers(shard)
    models = sorted({model for _, _, model in answers})
    questions = shard.rows("questions")
    for benchmark, part in settings.parts.items():
        for table, against in part.tables().items():
            for question in questions:
                if question["benchmark"] == benchmark:
                    key = benchmark, question["question_id"]
                    other = [] if against is None else answers[*key, against]
                    for model in models:
                        if model != against:
                            yield _Judgement(question["prompt_id"], question, model, table, answers[*key, model], other)


async def _judge(engine: ChatEngine, settings: _Judging, item: _Judgement) -> Outcome:
    part: Judging = settings.parts[item.question["benchmark"]]
    rows = await part.verdicts(engine, item.table, item.question, item.answers, item.against)
    replies = reply_status(f"the benchmark judge {settings.judge}", *(row["parse_status"] for row in rows))
    return Outcome({item.table: [{**row, **question_key(item.question, item.model)} for row in rows]}, replies)


def _role(settings: _Judging, item: _Judgement) -> str:
    return f"benchmark-judge/{item.question['benchmark']}{'/pairwise' if item.against else ''}"


JUDGE = Asking(tables={}, items=_judgements, ask=_judge, role=_role)


def judge_stages(
    settings: BenchmarksSettings, judges: Mapping[str, ModelSettings], inputs: Mapping[str, Stage]
) -> list[Stage]:
    """One stage per judge model, over all models' answers.

    Args:
        inputs: the stage of questions, and the stages of answers under "answers/NAME".

    Raises:
        BenchmarkFileError, TemplateError: a prompt file cannot be used.
    """
    stages = []
    for key in settings.judges:
        parts = {
            name: block.judging()
            for name, block in settings.chosen.items()
            if any(judge == key for judge, _ in block.judged().values())
        }
        judging = _Judging(judge=key, parts=parts)
        kinds = [kind for part in judging.parts.values() for kind in part.tables()]
        asking = dataclasses.replace(JUDGE, tables={kind: TABLES[kind] for kind in kinds})
        stages.append(asking.stage(f"bench-judge-{key}", judging, judges[key], dict(inputs), group="bench-judge"))
    return stages


class _Checking(NamedTuple):
    benchmark: str
    part: Checking


def check_stages(settings: BenchmarksSettings, inputs: Mapping[str, Stage]) -> list[Stage]:
    """One stage per benchmark that is checked without a model; inputs as in `judge_stages`.

    Raises:
        BenchmarkFileError: a checker is not installed.
    """
    stages = []
    for name, block in settings.chosen.items():
        if (part := block.checking()) is not None:
            stage = Stage(
                name="bench-checks" if name == "ifeval" else f"bench-checks-{name}",  # as stored runs call it
                group="bench-judge",
                work=ShardWork(function=check_shard, tables=(part.table,), settings=_Checking(name, part)),
                config=part.decisive(),
                inputs=dict(inputs),
            )
            stages.append(stage)
    return stages


def check_shard(given: ShardInput) -> ShardOutput:
    """The verdicts of one shard, ordered by model, then as the questions are.

    Raises:
        BadInput: a checker is missing on this node, or cannot decide about a question.
    """
    settings: _Checking = given.settings
    questions = [q for q in given.tables["questions"].to_pylist() if q["benchmark"] == settings.benchmark]
    answers = _answers(ShardTables(given.tables, given.facts))
    rows: list[Row] = []
    for model in sorted({model for _, _, model in answers}):
        for question in questions:
            try:
                found = settings.part.verdicts(question, answers[settings.benchmark, question["question_id"], model])
            except BenchmarkFileError as error:
                raise BadInput(str(error)) from error
            rows += [{**row, **question_key(question, model)} for row in found]
        given.tick(len(questions))
    return ShardOutput({settings.part.table: to_table(rows, TABLES[settings.part.table])})
