"""Scores for any number of answers by any judge strategy.

Independent and combined scoring give each answer a score as it is. A direct comparison sees two answers, so all pairs
are compared, and an answer's score is the share of its pairs that it wins (a tie is half a win): no answer's score
depends on the order in which a champion met the others.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Sequence

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.strategies import (
    WORST_FIRST,
    Judgement,
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
    """One judge's scores of several answers; None when a part of its judgement was not read, or when it was not asked
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
    """Score answers to one prompt. Equal texts are shown once and have one score.

    What the strategy's rule for conflict calls equally good gets equal scores, whatever the orders said one by one.
    """
    texts = list(dict.fromkeys(map(normalise_text, answers)))
    if len(texts) < 2:
        return Ranking(None, None, "skipped", None)
    shown = [next(a for a in answers if normalise_text(a) == text) for text in texts]
    sets = (
        list(itertools.combinations(range(len(shown)), 2)) if strategy.kind == "direct" else [tuple(range(len(shown)))]
    )
    found = await asyncio.gather(
        *(
            decide(engine, prompt, [shown[n] for n in members], strategy, templates, sampling, asking, layout)
            for members in sets
        )
    )
    scores = _won(len(shown), sets, found) if strategy.kind == "direct" else _given(found[0])
    looks = [look for judgement in found for look in judgement.looks]
    reasons, raws = (
        "\n\n".join(t for t in texts if t) or None for texts in ([x.reason for x in looks], [x.raw for x in looks])
    )
    status = min((judgement.parse_status for judgement in found), key=WORST_FIRST.index)
    if scores is None:
        return Ranking(None, None, status, raws)
    return Ranking(tuple(scores[texts.index(normalise_text(a))] for a in answers), reasons, status, raws)


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
