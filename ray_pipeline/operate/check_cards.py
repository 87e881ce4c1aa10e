"""Check of judges before a run: each reaches the floor that the user set on its card."""

from __future__ import annotations

from collections.abc import Iterator

from ray_pipeline.judge_card.cards import CardError, below_floor, cards_of
from ray_pipeline.operate.pending import Finding, Pending, names


def judge_cards(pending: Pending) -> Iterator[Finding]:
    """Every model with a card that a stage to do calls is the one on its card, and above its floor."""
    for key, (model, stages) in pending.models.items():
        if model.card is None:
            continue
        what = f"card of {key} ({model.shown}, for {names(stages)})"
        try:
            judges = cards_of(key, model)
        except CardError as error:
            yield Finding(what, "problem", str(error))
            continue
        problems = [
            f"judge {judge['facts']['judge']}: {problem}"
            for judge in judges
            for problem in below_floor(judge, model.card.floor)
        ]
        if problems:
            remedy = f"choose another judge, or change {key}.card.floor"
            yield Finding(what, "problem", f"{'; '.join(problems)} ({model.card.path}); {remedy}")
        else:
            yield Finding(what, "ok", "above its floor" if model.card.floor else "no floor is set")
