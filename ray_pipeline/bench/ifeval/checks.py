"""IFEval's verdicts on stored answers as a stage: by its checkers, without a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from ray_pipeline.bench.ifeval.checkers import Checkers, CheckersMissing, checker_version, load_checkers
from ray_pipeline.bench.ifeval.questions import prompt_of
from ray_pipeline.bench.ifeval.score import UnknownInstruction, check
from ray_pipeline.bench.schemas import BENCH_CHECKS
from ray_pipeline.bench.tables import answers_by_key, question_key
from ray_pipeline.graph.asking import Row, ShardTables
from ray_pipeline.graph.stage import BadInput, ShardInput, ShardOutput, ShardWork, Stage
from ray_pipeline.store.schemas import to_table


def checks(inputs: Mapping[str, Stage]) -> Stage:
    """Verdicts on all answers. Raises CheckersMissing if the checkers are not installed."""
    return Stage(
        name="bench-checks",
        group="bench-judge",
        work=ShardWork(function=check_shard, tables=("bench_checks",)),
        config={"checkers": checker_version()},
        inputs=dict(inputs),
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
                    **question_key(question, model),
                    "strict": list(v.strict),
                    "loose": list(v.loose),
                    "answered": v.answered,
                    "chance": v.chance,
                }
                for question, v in zip(questions, found, strict=True)
            ]
            given.tick(len(found))
    return ShardOutput({"bench_checks": to_table(rows, BENCH_CHECKS)})
