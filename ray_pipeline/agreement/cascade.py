"""A cascade of judges: cheap ones vote on every item, an expensive one on those where they are least sure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.agents.jury import MISSING, TIE, pool_votes
from ray_pipeline.agreement.measure_settings import CascadeSettings
from ray_pipeline.agreement.panel import Evaluator, Panel
from ray_pipeline.agreement.vote_agreement import agreement, held_out_choice
from ray_pipeline.stats.bootstrap import Estimate, Samples


@dataclasses.dataclass(frozen=True)
class Step:
    """Items whose cheap votes are no surer than a level go to the expensive judge.

    Attributes:
        asked: share of all items that this is.
        kappa: of all verdicts, over the items of the cascade.
    """

    asked: float
    kappa: Estimate


@dataclasses.dataclass(frozen=True)
class Cascade:
    """Kappa against the share of expensive calls.

    Attributes:
        steps: from no expensive call to one for every item.
        open: the step that asks where the cheap judges are not unanimous, or agree on a tie.
        items: labelled ones; where the expensive judge was chosen by its kappa, those outside the choosing part.
    """

    strategy: str
    expensive: str
    cheap: list[str]
    items: int
    steps: list[Step]
    open: Step


def cascade(
    strategy: str,
    judges: Sequence[Evaluator],
    panel: Panel,
    choose_on: NDArray[np.bool_],
    settings: CascadeSettings,
    samples: Samples,
) -> Cascade | None:
    """The cascade of a strategy's judges; None without labels or without one of its judges.

    Cheap votes are ordered by the share of the judges who agree with their pooled vote; a tie, by majority or for want
    of one, is the least sure. Items that are equally sure go to the expensive judge together.

    Args:
        choose_on: items on which the expensive judge is chosen where the settings name none, shape (items,).
    """
    votes = {e.judge: e.votes for e in judges}
    expensive, labels = settings.expensive, panel.labels
    if expensive is None:
        best = held_out_choice(votes, panel.labels, choose_on, samples)
        if best is None:
            return None
        expensive, labels = best.chosen, np.where(choose_on, MISSING, panel.labels).astype(np.int8)
    cheap = [name for name in settings.cheap or votes if name != expensive]
    if not (labels != MISSING).any() or not cheap or not {expensive, *cheap} <= votes.keys():
        return None
    codes = np.stack([votes[name] for name in cheap])
    (pooled,) = pool_votes(codes, np.ones((1, len(codes)), dtype=bool))
    same = np.where(pooled == MISSING, 0, (codes == pooled).sum(axis=0) / np.maximum((codes != MISSING).sum(axis=0), 1))
    sure = np.where(pooled == TIE, 0.0, same).round(9)
    levels = np.unique(sure)
    asked = np.stack([sure < level for level in [*levels, np.inf]])
    rows = np.where(asked, votes[expensive], pooled).astype(np.int8)
    found = agreement(rows, labels, samples, ("kappa",))
    steps = [Step(float(own.mean()), one.estimates["kappa"]) for own, one in zip(asked, found, strict=True)]
    unanimous = levels[-1] == 1.0
    return Cascade(
        strategy, expensive, cheap, int((labels != MISSING).sum()), steps, steps[-2] if unanimous else steps[-1]
    )


def check_names(settings: CascadeSettings, panel: Panel) -> None:
    """Raises ValueError if a judge of the settings is in no strategy of the panel."""
    known = sorted({e.judge for e in panel.evaluators})
    for name in [*([] if settings.expensive is None else [settings.expensive]), *(settings.cheap or ())]:
        if name not in known:
            raise ValueError(f"measure.cascade: unknown judge {name!r}; choose from {', '.join(known)}")
