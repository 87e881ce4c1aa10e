"""What the functions on frames share: settings with the defaults of a model's world, and many calls at once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from ray_pipeline.api.loop import gather, wait_for
from ray_pipeline.config.settings import Settings

S = TypeVar("S", bound=Settings)
T = TypeVar("T")

#: Calls in flight, unless a function is given another number; an endpoint has limits of its own as well.
CONCURRENCY = 256

#: What replies of the pocket world's models fit in; other models have the defaults of the settings.
_POCKET: dict[str, dict[str, Any]] = {
    "sampling": {"max_tokens": 64},
    "asking": {"reason_chars": 200},
    "review": {"reason_chars": 200, "feedback_chars": 200},
    "answer": {"max_tokens": 48},
    "strategy": {"reason_chars": 80},
    "strategy_sampling": {"max_tokens": 120},
    "debate": {"speech": {"max_tokens": 40}},
}


def settings_of(kind: type[S], given: S | Mapping[str, Any] | None, templates: str, role: str) -> S:
    """A block of settings: as given, or the caller's keys over the defaults of the model's world."""
    if isinstance(given, kind):
        return given
    defaults = _POCKET[role] if templates == "pocket" and role in _POCKET else {}
    return kind.model_validate({**defaults, **dict(given or {})})


def each(items: Sequence[tuple[Any, ...]], one: Callable[..., Coroutine[Any, Any, T]], concurrency: int) -> list[T]:
    return wait_for(gather([lambda item=item: one(*item) for item in items], concurrency))  # type: ignore[misc]


def ids_of(row: Mapping[str, Any], key: str) -> dict[str, str]:
    return {key: row[key], "prompt_id": row["prompt_id"]}
