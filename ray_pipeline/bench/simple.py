"""Benchmarks whose verdicts are numbers between 0 and 1: subclass one, write the questions and the verdict."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.benchmark import (
    Benchmark,
    Checking,
    Judging,
    Measurement,
    Reading,
    Scored,
    count_statuses,
    make_score,
    percent,
)
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.extensions import digests_in
from ray_pipeline.graph.asking import Row
from ray_pipeline.stats.bootstrap import bootstrap_mean
from ray_pipeline.stats.protocol import Protocol, PublishedProtocol, settings_text
from ray_pipeline.store.keys import digest


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A verdict on an answer. `score` is between 0 and 1, None exactly if `parse_status` is not a read one; `raw` is
    the judge's reply; `part` tells several verdicts on one question apart."""

    score: float | None
    parse_status: str = "ok"
    raw: str | None = None
    part: str = ""


class SimpleBenchmark(Benchmark):
    """Its score is the mean of the verdicts that could be read, as a percentage."""

    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1024)
    metric: ClassVar[str] = "score"
    table: ClassVar[str] = "bench_verdicts"

    def answering(self) -> SamplingSettings:
        return self.sampling

    def scores(self, run: Measurement) -> Scored:
        """Mean of each model, with the interval of the bootstrap over questions."""
        result, protocol = Scored(), self._protocol(run)
        for model, rows in run.verdicts(self.table).items():
            read = [(row["score"], row["question_id"]) for row in rows if row["score"] is not None]
            total, unread = sum(score for score, _ in read), len(rows) - len(read)
            mean = bootstrap_mean([score for score, _ in read], [question for _, question in read], run.draws, run.seed)
            score = make_score(
                model,
                run.benchmark,
                self.metric,
                protocol,
                PublishedProtocol(protocol),
                value=percent(mean.mean),
                low=percent(mean.low),
                high=percent(mean.high),
                rows=len(read),
                unread=unread,
                worst=percent(total / len(rows)),
                best=percent((total + unread) / len(rows)),
                note="" if read else "no verdict could be read",
            )
            statuses = count_statuses(row["parse_status"] for row in rows)
            result.add([score], Reading(model, run.benchmark, statuses))
        return result

    def _protocol(self, run: Measurement) -> Protocol:
        columns = ("question_id", "turns", "references", "checks")
        made = Protocol(
            run.benchmark,
            questions=digest([[row[column] for column in columns] for row in run.questions]),
            checker=" ".join([self._type, *digests_in(self._type).values()]),
            answers=settings_text(**self.sampling.model_dump()),
        )
        for key, sampling in self.judged().values():
            drawn = settings_text(**sampling.model_dump())
            judge = run.judges[key]
            made = judge.marked(dataclasses.replace(made, judge=judge.identity, judge_sampling=drawn))
        return made


class CheckedBenchmark(SimpleBenchmark):
    """A benchmark whose answers are checked by a program."""

    @abc.abstractmethod
    def grade(self, question: Row, answers: Sequence[str]) -> float | None:
        """How good the answers to the turns of a question are, from 0 to 1; None where that cannot be decided."""

    def checking(self) -> Checking:
        return self

    def verdicts(self, question: Row, answers: Sequence[Row]) -> list[Row]:
        texts = [row["answer"] for row in answers if row["answer"] is not None]
        if len(texts) < len(answers):
            return [vars(Verdict(None, "skipped"))]
        score = self.grade(question, texts)
        return [vars(Verdict(None, "unparsed") if score is None else Verdict(float(score)))]


class JudgedBenchmark(SimpleBenchmark):
    """A benchmark whose answers are judged by a model."""

    judge: str = Field("judge", description="key of the judging model")
    judge_sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1024)

    @abc.abstractmethod
    async def grade(self, engine: ChatEngine, question: Row, answers: Sequence[str]) -> Verdict:
        """Ask the judge about the answers to the turns of a question."""

    def judged(self) -> dict[str, tuple[str, SamplingSettings]]:
        return {"judge_sampling": (self.judge, self.judge_sampling)}

    def judging(self) -> Judging:
        return self

    def tables(self) -> dict[str, str | None]:
        return {self.table: None}

    async def verdicts(
        self, engine: ChatEngine, table: str, question: Row, answers: Sequence[Row], against: Sequence[Row]
    ) -> list[Row]:
        texts = [row["answer"] for row in answers if row["answer"] is not None]
        if len(texts) < len(answers):
            return [vars(Verdict(None, "skipped"))]
        return [vars(await self.grade(engine, question, texts))]
