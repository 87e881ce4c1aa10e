"""A jury that sits: judges on any engines and strategies see the same answers, and their judgements are pooled."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.jury import VOTE_RULES, PoolRule
from ray_pipeline.agents.strategies import (
    WORST_FIRST,
    Judgement,
    Strategy,
    StrategyAsking,
    StrategyTemplates,
    best_scores,
    decide,
)
from ray_pipeline.engines.base import ChatEngine, Message


@dataclasses.dataclass(frozen=True)
class Juror:
    """One judge of a jury. Two jurors of one engine and strategy ask the same calls: the call log makes them once."""

    engine: ChatEngine
    strategy: Strategy
    sampling: SamplingSettings
    weight: float = 1.0


async def sit(
    jurors: Mapping[str, Juror],
    prompt: Sequence[Message],
    answers: Sequence[str],
    templates: StrategyTemplates,
    asking: StrategyAsking,
    pool: PoolRule = "mode",
) -> tuple[Judgement, dict[str, Judgement]]:
    """All jurors judge together; returns the jury's judgement and each juror's own.

    Raises:
        ValueError: there is no juror, or a rule that pools scores meets a juror that gives none.
    """
    members = await asyncio.gather(
        *(decide(j.engine, prompt, answers, j.strategy, templates, j.sampling, asking) for j in jurors.values())
    )
    found = dict(zip(jurors, members, strict=True))
    return pool_judgements(found, pool, {name: juror.weight for name, juror in jurors.items()}), found


def pool_judgements(
    judgements: Mapping[str, Judgement], pool: PoolRule = "mode", weights: Mapping[str, float] | None = None
) -> Judgement:
    """One judgement from several; members that could not be read abstain, and if all did, it is unread.

    Votes: what most members hold best; where several such answers (or ties) lead, they are equal. For two answers
    this is the unique mode of A, B and tie, else a tie. Scores: each answer's are pooled, and the highest is best.

    Raises:
        ValueError: there is no judgement, or a rule that pools scores meets one without.
    """
    if not judgements:
        raise ValueError("a jury needs at least one judgement")
    looks = tuple(look for judgement in judgements.values() for look in judgement.looks)
    read = {name: judgement for name, judgement in judgements.items() if judgement.read}
    if not read:
        status = min((j.parse_status for j in judgements.values()), key=WORST_FIRST.index)
        return Judgement(None, (), status, looks)
    share = {name: 1.0 if weights is None or pool in ("mode", "mean", "median") else weights[name] for name in read}
    status = min((j.parse_status for j in read.values()), key=WORST_FIRST.index)
    if pool in VOTE_RULES:
        best = most_held([j.best for j in read.values()], list(share.values()))
        return Judgement(None, best, status, looks)
    if unscored := [name for name, judgement in read.items() if judgement.scores is None]:
        raise ValueError(f"the rule {pool} pools scores, and {', '.join(unscored)} gives none; use mode or weighted")
    columns = list(zip(*(j.scores for j in read.values() if j.scores is not None), strict=True))
    if pool == "median":
        scores = tuple(statistics.median(column) for column in columns)
    else:
        total = sum(share.values())
        scores = tuple(sum(s * w for s, w in zip(c, share.values(), strict=True)) / total for c in columns)
    return Judgement(scores, best_scores(scores), status, looks)


def most_held(best: Sequence[tuple[int, ...]], weights: Sequence[float] | None = None) -> tuple[int, ...]:
    """What most hold best (a winner, or a set of equals); the union of all that lead where several do."""
    support: dict[tuple[int, ...], float] = {}
    for answers, weight in zip(best, weights or [1.0] * len(best), strict=True):
        support[answers] = support.get(answers, 0.0) + weight
    top = max(support.values())
    leaders = [answers for answers, weight in support.items() if weight >= top - 1e-9]
    return tuple(sorted({answer for answers in leaders for answer in answers}))
