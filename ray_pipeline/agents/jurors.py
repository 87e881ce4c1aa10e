"""A jury's judgement of several answers, from the judgements of its members.

Each model's verdicts are a stage of their own; here they are joined by the judge's name. `jury` pools whole panels of
votes on two answers at once, by the same rules.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import Field, field_validator, model_validator

from ray_pipeline.agents.jury import VOTE_RULES, PoolRule
from ray_pipeline.agents.strategies import WORST_FIRST, Judgement, best_scores
from ray_pipeline.config.settings import Settings


class JuryRule(Settings):
    """How the judges' scores of several answers become the jury's."""

    pool: PoolRule = Field(
        "mean",
        description="mean, median, weighted_mean: of each answer's scores. mode, weighted: every judge votes "
        "for its highest score, and the most frequent (or heaviest) vote wins; several that lead "
        "are tied",
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="weight of each judge, for weighted and weighted_mean"
    )

    @field_validator("pool", mode="before")
    @classmethod
    def _for_one_item(cls, pool: Any) -> Any:
        if pool in ("dawid_skene", "one_coin"):
            raise ValueError(
                f"{pool} is fitted to the votes on many items, and here one prompt is pooled at a time; use "
                f"{', '.join(get_args(PoolRule))} (measure.juries.pool of an agreement run takes {pool})"
            )
        return pool

    @model_validator(mode="after")
    def _consistent(self) -> JuryRule:
        if self.weighs and not self.weights:
            raise ValueError(f"pool {self.pool} needs weights; set one for each judge")
        if self.weights and not self.weighs:
            raise ValueError(
                f"weights has no effect with pool {self.pool}; remove it, or set pool to weighted or weighted_mean"
            )
        if any(weight <= 0 for weight in self.weights.values()):
            raise ValueError("weights must be greater than 0; remove a judge instead of giving it no weight")
        return self

    @property
    def votes(self) -> bool:
        return self.pool in VOTE_RULES

    @property
    def weighs(self) -> bool:
        return self.pool in ("weighted", "weighted_mean")

    def among(self, judges: Sequence[str]) -> JuryRule:
        """The rule for a part of the judges."""
        weights = {name: weight for name, weight in self.weights.items() if name in judges}
        return self.model_copy(update={"weights": weights})

    def check(self, judges: Sequence[str]) -> None:
        """Raise ValueError unless the weights, if used, name exactly these judges."""
        if not self.weighs:
            return
        if lacking := [name for name in judges if name not in self.weights]:
            raise ValueError(f"weights has no entry for {', '.join(lacking)}; add it")
        if strangers := sorted(set(self.weights) - set(judges)):
            raise ValueError(f"weights: unknown judge {', '.join(strangers)}; choose from {', '.join(judges)}")


MEAN = JuryRule()


def jury_scores(given: Mapping[str, Sequence[float]], rule: JuryRule) -> tuple[float, ...]:
    """The jury's scores of several answers; under a voting rule the best answers get 1 and the others 0.

    Args:
        given: judge → its scores of the same answers, all of them read.

    Raises:
        ValueError: no judge, or a judge without a weight under a weighted rule.
    """
    rule.check(list(given))
    said = {name: Judgement(tuple(scores), best_scores(scores), "ok", ()) for name, scores in given.items()}
    found = pool_judgements(said, rule.pool, rule.weights or None)
    if found.scores is not None:
        return found.scores
    answers = len(next(iter(given.values())))
    return tuple(1.0 if answer in found.best else 0.0 for answer in range(answers))


def pool_judgements(
    judgements: Mapping[str, Judgement], pool: PoolRule = "mode", weights: Mapping[str, float] | None = None
) -> Judgement:
    """One judgement from several; unread members abstain, and if all are unread, so is the jury.

    Votes: the best answer (or tie) of most members wins; several that lead are tied. For two answers this is the
    unique mode of A, B and tie, else a tie. Scores: each answer's are pooled, and the highest is best.

    Raises:
        ValueError: no judgement, an unknown rule, or no scores under a rule that pools scores.
    """
    if not judgements:
        raise ValueError("a jury needs at least one judgement")
    if pool not in get_args(PoolRule):
        raise ValueError(f"unknown pool {pool!r}; choose from {', '.join(get_args(PoolRule))}")
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
        raise ValueError(f"pool {pool} needs scores, but {', '.join(unscored)} has none; use mode or weighted")
    columns = list(zip(*(j.scores for j in read.values() if j.scores is not None), strict=True))
    if pool == "median":
        scores = tuple(statistics.median(column) for column in columns)
    else:
        total = sum(share.values())
        scores = tuple(sum(s * w for s, w in zip(c, share.values(), strict=True)) / total for c in columns)
    return Judgement(scores, best_scores(scores), status, looks)


def most_held(best: Sequence[tuple[int, ...]], weights: Sequence[float] | None = None) -> tuple[int, ...]:
    """The most frequent value of `best` (a winner, or tied answers); the union of the leaders where several lead."""
    support: dict[tuple[int, ...], float] = {}
    for answers, weight in zip(best, weights or [1.0] * len(best), strict=True):
        support[answers] = support.get(answers, 0.0) + weight
    top = max(support.values())
    leaders = [answers for answers, weight in support.items() if weight >= top - 1e-9]
    return tuple(sorted({answer for answers in leaders for answer in answers}))
