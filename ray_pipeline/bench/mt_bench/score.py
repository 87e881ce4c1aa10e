"""MT-Bench: 80 two-turn questions, graded from 1 to 10 by a judge, or compared between two models in both orders.

Source: Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685), and its
published code (FastChat, fastchat/llm_judge).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import pyarrow as pa

from ray_pipeline.bench.conversation import Conversation
from ray_pipeline.bench.judge_prompts import BenchPrompt, prompts_digest
from ray_pipeline.bench.mt_bench.judge import (
    HIGH,
    LOW,
    BenchAsking,
    Order,
    Turn,
    TurnComparison,
    TurnRating,
    compare_turn,
    rate_turn,
)
from ray_pipeline.bench.mt_bench.questions import ANSWER_TOKENS, CATEGORY_TEMPERATURES, Question
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.stats.bootstrap import Interval, bootstrap_mean
from ray_pipeline.stats.protocol import Protocol, PublishedProtocol, settings_text
from ray_pipeline.stats.winrate import WinRate, win_rate
from ray_pipeline.store.keys import digest
from ray_pipeline.store.schemas import READ_STATUSES

Mode = Literal["single", "pairwise"]
TURNS: tuple[Turn, Turn] = (1, 2)
ORDERS: tuple[Order, Order] = ("ab", "ba")


@dataclasses.dataclass(frozen=True)
class RatingMean:
    """Mean rating over the turns that were read (as published), with its interval (bootstrap over questions).

    `worst` and `best` are the mean over all turns had every unread rating been 1 or 10.
    """

    interval: Interval
    read: int
    unread: int
    worst: float | None
    best: float | None

    @property
    def mean(self) -> float | None:
        return self.interval.mean


@dataclasses.dataclass(frozen=True)
class MtBenchScores:
    """Ratings of one model. `statuses` counts turns by parse status; `contradictory` replies hold two verdicts."""

    overall: RatingMean
    turns: Mapping[int, RatingMean]
    categories: Mapping[str, RatingMean]
    category_turns: Mapping[tuple[str, int], RatingMean]
    statuses: Mapping[str, int]
    contradictory: int


@dataclasses.dataclass(frozen=True)
class PairwiseScores:
    """Model A against model B; in the win rates "policy" is A and "base" is B. A pair is one turn of one question, won
    only if both orders agree; intervals resample questions."""

    overall: WinRate
    turns: Mapping[int, WinRate]
    categories: Mapping[str, WinRate]
    contradictory: int


# --- judging ----------------------------------------------------------------------------------------------------------


async def grade(
    engine: ChatEngine,
    question: Question,
    answers: Conversation,
    prompts: Mapping[str, BenchPrompt],
    asking: BenchAsking,
) -> list[TurnRating]:
    """The ratings of both turns, with the question's references where it has them."""
    asked = (rate_turn(engine, prompts, question, turn, answers.turns, asking) for turn in TURNS)
    return list(await asyncio.gather(*asked))


async def compare(
    engine: ChatEngine,
    question: Question,
    answers_a: Conversation,
    answers_b: Conversation,
    prompts: Mapping[str, BenchPrompt],
    asking: BenchAsking,
) -> list[TurnComparison]:
    """The comparisons of both turns in both orders: turn 1 ab, turn 1 ba, turn 2 ab, turn 2 ba."""
    asked = (
        compare_turn(engine, prompts, question, turn, answers_a.turns, answers_b.turns, asking, order)
        for turn in TURNS
        for order in ORDERS
    )
    return list(await asyncio.gather(*asked))


# --- scores -----------------------------------------------------------------------------------------------------------


def mt_bench_scores(ratings: Sequence[TurnRating], *, draws: int = 2000, seed: int = 0) -> MtBenchScores:
    """Means of one model's ratings: overall, by turn, by category, and by both.

    Raises:
        ValueError: a turn of a question is rated twice, or a score does not go with its parse status.
    """
    seen: set[tuple[int, int]] = set()
    for r in ratings:
        if (r.question_id, r.turn) in seen:
            raise ValueError(f"question {r.question_id}, turn {r.turn} is rated twice")
        seen.add((r.question_id, r.turn))
        if (r.score is None) == (r.parse_status in READ_STATUSES):
            raise ValueError(f"question {r.question_id}, turn {r.turn}: status {r.parse_status}, but score {r.score}")

    def mean(keep: Callable[[TurnRating], bool]) -> RatingMean:
        return _mean([r for r in ratings if keep(r)], draws, seed)

    categories = sorted({r.category for r in ratings})
    statuses: dict[str, int] = {}
    for r in ratings:
        statuses[r.parse_status] = statuses.get(r.parse_status, 0) + 1
    return MtBenchScores(
        overall=mean(lambda r: True),
        turns={turn: mean(lambda r, t=turn: r.turn == t) for turn in TURNS},  # type: ignore[misc]
        categories={c: mean(lambda r, c=c: r.category == c) for c in categories},  # type: ignore[misc]
        category_turns={
            (c, turn): mean(lambda r, c=c, t=turn: (r.category, r.turn) == (c, t))  # type: ignore[misc]
            for c in categories
            for turn in TURNS
        },
        statuses=dict(sorted(statuses.items())),
        contradictory=sum(r.contradictory for r in ratings),
    )


def _mean(ratings: Sequence[TurnRating], draws: int, seed: int) -> RatingMean:
    read = [(r.score, r.question_id) for r in ratings if r.score is not None]
    unread, total = len(ratings) - len(read), sum(score for score, _ in read)
    return RatingMean(
        interval=bootstrap_mean([s for s, _ in read], [q for _, q in read], draws, seed, bounds=(LOW, HIGH)),
        read=len(read),
        unread=unread,
        worst=(total + LOW * unread) / len(ratings) if ratings else None,
        best=(total + HIGH * unread) / len(ratings) if ratings else None,
    )


def pairwise_scores(
    comparisons: Sequence[TurnComparison], judge: str, *, draws: int = 2000, seed: int = 0
) -> PairwiseScores:
    """Win rates of model A over model B from comparisons in both orders; a missing order is unread.

    Raises:
        ValueError: the same turn was compared twice in one order.
    """

    def rate(keep: Callable[[TurnComparison], bool]) -> WinRate:
        rows = [
            {
                "pair_id": f"{c.question_id}/{c.turn}",
                "prompt_id": str(c.question_id),
                "judge": judge,
                "order": c.order,
                "choice": c.choice,
                "parse_status": c.parse_status,
            }
            for c in comparisons
            if keep(c)
        ]
        return win_rate(pa.Table.from_pylist(rows, schema=_COMPARISONS), judge, draws=draws, seed=seed)

    return PairwiseScores(
        overall=rate(lambda c: True),
        turns={turn: rate(lambda c, t=turn: c.turn == t) for turn in sorted({c.turn for c in comparisons})},  # type: ignore[misc]
        categories={
            name: rate(lambda c, n=name: c.category == n)  # type: ignore[misc]
            for name in sorted({c.category for c in comparisons})
        },
        contradictory=sum(c.contradictory for c in comparisons),
    )


_COMPARISONS = pa.schema(
    [(name, pa.string()) for name in ("pair_id", "prompt_id", "judge", "order", "choice", "parse_status")]
)


# --- protocol ---------------------------------------------------------------------------------------------------------


def questions_digest(questions: Sequence[Question]) -> str:
    """Digest of a set of questions, independent of their order and of references."""
    return digest(sorted([q.question_id, q.category, list(q.turns)] for q in questions))


def references_digest(questions: Sequence[Question]) -> str | None:
    """Digest of the reference answers that are shown; None where there are none."""
    shown = sorted([q.question_id, list(q.references)] for q in questions if q.references is not None)
    return digest(shown) if shown else None


def mt_bench_protocol(
    mode: Mode,
    questions: Sequence[Question],
    prompts: Mapping[str, BenchPrompt],
    asking: BenchAsking,
    judge: str,
    contradictory: int,
    *,
    reference: str | None = "gpt-4",
    answer_tokens: int = ANSWER_TOKENS,
    temperatures: Mapping[str, float] = CATEGORY_TEMPERATURES,
) -> Protocol:
    """What a score was measured with.

    Args:
        judge: identity of the judging model.
        contradictory: replies with two verdicts; without any, both rules of reading are the published one.
        reference: who wrote the reference answers; of comparisons, model B.
    """
    published = asking.reading == "published" or contradictory == 0
    shown = references_digest(questions)
    return Protocol(
        benchmark="MT-Bench",
        metric="" if mode == "single" else "pairwise",
        questions=questions_digest(questions),
        judge=judge,
        judge_prompts=prompts_digest(prompts, mode),
        judge_sampling=_judge_sampling(asking),
        reading="first verdict" if published else "no contradiction",
        order="both orders" if mode == "pairwise" else None,
        reference=reference if shown or mode == "pairwise" else None,
        reference_answers=shown,
        answers=_answer_sampling(answer_tokens, temperatures),
    )


def _judge_sampling(asking: BenchAsking) -> str:
    s = asking.sampling
    forced = {"grammar": True} if asking.grammar else {}
    return settings_text(
        temperature=s.temperature,
        top_p=s.top_p,
        max_tokens=s.max_tokens,
        retries=asking.retries,
        extra=dict(s.extra),
        **forced,
    )


def published_mt_bench() -> PublishedProtocol:
    """The protocol of the published single-answer grades: FastChat's files and GPT-4 as judge.

    Pairwise win rates have none here: they depend on the opponent's recorded answers, which have no digest.
    """
    return PublishedProtocol(
        Protocol(
            benchmark="MT-Bench",
            questions=_QUESTIONS,
            judge="endpoint:gpt-4@https://api.openai.com/v1",
            judge_prompts=_PROMPTS,
            judge_sampling=_judge_sampling(BenchAsking()),
            reading="first verdict",
            reference="gpt-4",
            reference_answers=_REFERENCES,
            answers=_answer_sampling(ANSWER_TOKENS, CATEGORY_TEMPERATURES),
        )
    )


def _answer_sampling(max_tokens: int, temperatures: Mapping[str, float]) -> str:
    return settings_text(max_tokens=max_tokens, **{f"temperature {c}": t for c, t in temperatures.items()})


# Digests of FastChat's files, recomputed by the tests where those files are at hand.
_QUESTIONS = "e218a10e21004c15dfff49491558b3b8"
_REFERENCES = "0bc38fadd869757cb2e238b2b9b588cd"
_PROMPTS = "fac3965c3e73dd21f957d7252890f216"
