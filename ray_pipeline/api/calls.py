"""Shared by the functions on frames: settings with defaults that suit the model, and concurrent calls."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from ray_pipeline.api.loop import gather, wait_for
from ray_pipeline.config.settings import Settings

S = TypeVar("S", bound=Settings)
T = TypeVar("T")

#: Default number of calls in flight; an endpoint has its own limits as well.
CONCURRENCY = 256

#: Limits that suit the replies of the pocket models; other models use the defaults of the settings.
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
    """A block of settings: the caller's object, or the caller's keys over the defaults for the model."""
    if isinstance(given, kind):
        return given
    defaults = _POCKET[role] if templates == "pocket" and role in _POCKET else {}
    return kind.model_validate({**defaults, **dict(given or {})})


def each(items: Sequence[tuple[Any, ...]], one: Callable[..., Coroutine[Any, Any, T]], concurrency: int) -> list[T]:
    return wait_for(gather([lambda item=item: one(*item) for item in items], concurrency))  # type: ignore[misc]


def ids_of(row: Mapping[str, Any], key: str) -> dict[str, str]:
    return {key: row[key], "prompt_id": row["prompt_id"]}
