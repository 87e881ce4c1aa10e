"""Scores for any number of answers by any judge strategy, or by a debate.

Independent and combined scoring give each answer a score directly. A direct comparison takes two answers, so all pairs
are compared, and an answer's score is the share of its pairs that it wins (a tie is half a win); unlike in a knock-out,
no score depends on the order of the comparisons.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Sequence

from ray_pipeline.agents.debate import DebateSettings, DebateTemplates, debate
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.strategies import (
    WORST_FIRST,
    Judgement,
    Look,
    Strategy,
    StrategyAsking,
    StrategyTemplates,
    decide,
)
from ray_pipeline.agents.templates import Layout
from ray_pipeline.engines.base import ChatEngine, Message
from ray_pipeline.store.keys import normalise_text


@dataclasses.dataclass(frozen=True)
class Ranking:
    """One judge's scores of several answers; None when a part of its judgement is unread, or when no call was made
    (`skipped`: fewer than two different answers)."""

    scores: tuple[float, ...] | None
    reason: str | None
    parse_status: str
    raw: str | None


async def rank(
    engine: ChatEngine,
    prompt: Sequence[Message],
    answers: Sequence[str],
    strategy: Strategy,
    templates: StrategyTemplates,
    sampling: SamplingSettings,
    asking: StrategyAsking,
    layout: Layout = "shared_first",
) -> Ranking:
    """Score answers to one prompt. Equal texts are shown once and share one score.

    Answers that the strategy's conflict rule treats as tied get equal scores, whatever the scores of each order.
    """
    shown = _distinct(answers)
    if len(shown) < 2:
        return NOT_ASKED
    whole, pairwise = range(len(shown)), strategy.form.pairwise
    sets: list[tuple[int, ...]] = list(itertools.combinations(whole, 2)) if pairwise else [tuple(whole)]
    found = await asyncio.gather(
        *(
            decide(engine, prompt, [shown[n] for n in members], strategy, templates, sampling, asking, layout)
            for members in sets
        )
    )
    scores = _won(len(shown), sets, found) if pairwise else _given(found[0])
    looks = [look for judgement in found for look in judgement.looks]
    status = min((judgement.parse_status for judgement in found), key=WORST_FIRST.index)
    return _ranking(answers, shown, scores, [look.reason for look in looks], looks, status)


async def rank_by_debate(
    engine: ChatEngine,
    prompt: Sequence[Message],
    answers: Sequence[str],
    rules: DebateSettings,
    templates: DebateTemplates,
    sampling: SamplingSettings,
    asking: StrategyAsking,
) -> Ranking:
    """Score answers to one prompt by the final scores of a debate whose roles share one model.

    Under `pool: mean` the scores are the roles' means; under `vote` the best answers get 1 and the others 0. Equal
    texts are shown once and share one score.
    """
    shown = _distinct(answers)
    if len(shown) < 2:
        return NOT_ASKED
    found = await debate(engine, prompt, shown, templates, rules, sampling, asking)
    scores = _given(found.judgement)
    if rules.pool == "vote" and found.judgement.read:
        scores = [1.0 if answer in found.judgement.best else 0.0 for answer in range(len(shown))]
    looks = [look for voice in found.voices.values() for look in voice.looks]
    reasons = [look.reason for look in found.judgement.looks]
    return _ranking(answers, shown, scores, reasons, looks, found.judgement.parse_status)


#: Without a call.
NOT_ASKED = Ranking(None, None, "skipped", None)


def _distinct(answers: Sequence[str]) -> list[str]:
    """The answers without repeated texts."""
    first: dict[str, str] = {}
    for answer in answers:
        first.setdefault(normalise_text(answer), answer)
    return list(first.values())


def _ranking(
    answers: Sequence[str],
    shown: Sequence[str],
    scores: Sequence[float] | None,
    reasons: Sequence[str | None],
    looks: Sequence[Look],
    status: str,
) -> Ranking:
    """A ranking of all answers from the scores of the distinct texts."""
    raw = "\n\n".join(look.raw for look in looks if look.raw) or None
    if scores is None:
        return Ranking(None, None, status, raw)
    of_text = {normalise_text(text): score for text, score in zip(shown, scores, strict=True)}
    reason = "\n\n".join(text for text in reasons if text) or None
    return Ranking(tuple(of_text[normalise_text(answer)] for answer in answers), reason, status, raw)


def _given(judgement: Judgement) -> list[float] | None:
    if judgement.scores is None:
        return None
    top = max(judgement.scores)
    return [top if answer in judgement.best else score for answer, score in enumerate(judgement.scores)]


def _won(answers: int, pairs: Sequence[tuple[int, ...]], found: Sequence[Judgement]) -> list[float] | None:
    if not all(judgement.read for judgement in found):
        return None
    won = [0.0] * answers
    for members, judgement in zip(pairs, found, strict=True):
        for place in judgement.best:
            won[members[place]] += 1.0 / len(judgement.best)
    return [wins / (answers - 1) for wins in won]
