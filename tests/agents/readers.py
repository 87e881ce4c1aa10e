"""The readers of replies, with None for a reply that they cannot read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray_pipeline.agents import labelled_replies, replies
from ray_pipeline.agents.replies import Read


def _or_none(reader: Callable[..., Any]) -> Callable[..., Read | None]:
    def read(*args: Any, **options: Any) -> Read | None:
        found = reader(*args, **options)
        return found if isinstance(found, Read) else None

    return read


read_score, read_critique, read_choice = map(
    _or_none, (replies.score_verdict, replies.critique_verdict, replies.choice_verdict)
)
read_scores, read_rating, read_pick = map(
    _or_none, (labelled_replies.scores_verdict, labelled_replies.rating_verdict, labelled_replies.pick_verdict)
)
