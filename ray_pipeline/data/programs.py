"""Judges that are programs: a checker's verdict on the judges' scale, without a call (`judge.programs`)."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

import ray_pipeline.data.answer_checkers
import ray_pipeline.data.unit_tests  # noqa: F401 (registers its checker)
from ray_pipeline.agents.judges import Rubric
from ray_pipeline.config.settings import Settings
from ray_pipeline.constraints.official import CheckersMissing
from ray_pipeline.data.answers import answers_of
from ray_pipeline.data.checkers import Check, check_checker, checker_digests
from ray_pipeline.graph.stage import BadInput, ShardInput, ShardOutput, ShardWork, Stage, StageStop
from ray_pipeline.store.schemas import VERDICTS, to_table


class ProgramJudge(Settings):
    """A judge that is a program: a checker, which makes no LLM call."""

    name: str = Field(description="name of the judge in the tables")
    checker: str = Field(
        description="`ifeval` or `ifeval_loose` (the official checkers, for prompts with constraints), `regex`, "
        "`json_schema`, `answer` (the prompt's reference answer), `unit_tests` (runs code), or a file that "
        "registers a checker (my_checker.py)"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of the checker: `pattern` of `regex`; `schema` of `json_schema`; `reference`, `compare`, "
        "`pattern` and `tolerance` of `answer`; `execute`, `tests`, `cpu_s`, `memory_mb` of `unit_tests`; "
        "those of a class that your file registers",
    )
    low: int = Field(1, description="score where no requirement is met")
    high: int = Field(10, description="score where all are met; a share between them is mapped linearly")

    @model_validator(mode="after")
    def _valid(self) -> ProgramJudge:
        _ = self.rubric  # name and scale
        return self

    @property
    def rubric(self) -> Rubric:
        """Name and scale."""
        return Rubric(name=self.name, low=self.low, high=self.high)


class _Judging(Settings):
    answers: tuple[str, ...]
    programs: tuple[ProgramJudge, ...]

    @property
    def rubrics(self) -> tuple[Rubric, ...]:
        """The judges, as the checks before a run look for them."""
        return tuple(program.rubric for program in self.programs)


def programs(
    judges: Sequence[ProgramJudge], prompts: Stage, answers: Mapping[str, Stage], name: str, group: str, holds: str
) -> Stage:
    """The verdicts of all programs, ordered by candidate and judge; arguments as of `judges`.

    Raises:
        BadInput: a checker's packages are not installed.
    """
    settings = _Judging(answers=tuple(answers), programs=tuple(judges))
    external: dict[str, str] = {}
    try:
        for judge in judges:
            external |= checker_digests(judge.checker)
    except CheckersMissing as error:
        raise BadInput(str(error)) from error
    return Stage(
        name=name,
        group=group,
        role=holds,
        work=ShardWork(function=judge_shard, settings=settings, tables=("verdicts",)),
        config=settings.decisive(),
        inputs={"prompts": prompts, **answers},
        external=external,
    )


def _runnable(program: ProgramJudge) -> Check:
    try:
        return check_checker(program.checker, program.options)
    except CheckersMissing as error:  # on this node
        raise StageStop(str(error)) from error


def judge_shard(given: ShardInput) -> ShardOutput:
    """One verdict for each answer and program of a shard.

    A program that cannot decide gives `missing`, and its candidate is incomplete.
    """
    settings: _Judging = given.settings
    meta = dict(zip(*(given.tables["prompts"][name].to_pylist() for name in ("prompt_id", "meta")), strict=True))
    checks = {program.name: _runnable(program) for program in settings.programs}
    rows: list[dict[str, Any]] = []
    for answer in answers_of(given.tables["prompts"], *(given.tables[role] for role in settings.answers)):
        for program in settings.programs:
            row = {"candidate_id": answer.id, "prompt_id": answer.prompt_id, "judge": program.name}
            if answer.missing is not None:
                rows.append({**row, "parse_status": answer.missing})
                continue
            found = checks[program.name](answer.messages, answer.response, meta[answer.prompt_id])
            if found is None:
                rows.append({**row, "parse_status": "missing"})
            else:
                rows.append(
                    {**row, "score": program.rubric.scaled(found.share), "reason": found.reason, "parse_status": "ok"}
                )
        given.tick(1)
    counts = collections.Counter(f"{row['judge']}.{row['parse_status']}" for row in rows)
    return ShardOutput({"verdicts": to_table(rows, VERDICTS)}, dict(sorted(counts.items())))
