"""Usage of a run: calls, tokens, money and time, in one type that adds up."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.engines.base import Message


@dataclasses.dataclass
class Usage:
    """Counters of a shard, a stage or a session; sums with `+`. Tokens and cost are of calls that an engine answered.

    Attributes:
        calls_engine: calls answered by an engine.
        calls_log: calls answered by the call log.
        calls_shared: calls that waited for an equal one in flight.
        errors: calls that failed.
        cached_tokens: prompt tokens found in the engine's prefix cache; they are among `prompt_tokens`.
        cut_prompts: replies to prompts of which the server left out a part, from an engine or the log.
        cost: price of the replies, in the currency of the endpoint's prices.
        seconds: worker time, summed over shards.
        device_seconds: time of GPUs (without GPUs: of engines) that were held, idle or not.
        start_seconds: those of the `device_seconds` that engines took to start.
        wall_seconds: time on the clock from the first shard to the last.
    """

    calls_engine: float = 0
    calls_log: float = 0
    calls_shared: float = 0
    errors: float = 0
    prompt_tokens: float = 0
    completion_tokens: float = 0
    cached_tokens: float = 0
    cut_prompts: float = 0
    cost: float = 0.0
    seconds: float = 0.0
    device_seconds: float = 0.0
    start_seconds: float = 0.0
    wall_seconds: float = 0.0

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Usage:
        """Usage from stored counters; missing ones are 0, other keys are ignored."""
        return cls(**{name: stored[name] for name in cls.__dataclass_fields__ if name in stored})

    def plain(self) -> dict[str, float]:
        """Counters by name, as stored; only the time for a stage without shards, which counts nothing."""
        alone = {"wall_seconds": self.wall_seconds}
        return dict(vars(self)) if self != Usage(**alone) else alone

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __bool__(self) -> bool:
        return any(vars(self).values())

    @property
    def calls(self) -> float:
        """Calls answered by an engine or the log."""
        return self.calls_engine + self.calls_log

    @property
    def tokens(self) -> float:
        return self.prompt_tokens + self.completion_tokens

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of the prompt tokens that came from the prefix cache; None without prompt tokens."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


#: Fewest characters a prompt has for `prompt_was_cut`, and most of them that one token stands for.
_CUT_FROM, _CUT_CHARACTERS = 2000, 12
#: Runs of one character, and of other characters than letters and digits: a tokenizer may make one token of each.
_RUNS = re.compile(r"(\w)\1+|\W+")


def prompt_was_cut(messages: Sequence[Message], prompt_tokens: int, cached_tokens: int = 0) -> bool:
    """Whether a server can only have read a part of the prompt, by the tokens that it reports.

    The bound errs on the side of no alarm in any language: of text with 2,000 characters or more (runs of blanks, marks
    or one character count as one), no tokenizer makes less than a token of 12 characters; English has about 5 a token,
    other languages have fewer. A server that reports only the tokens outside its cache gives no alarm either.
    """
    if 0 < prompt_tokens <= cached_tokens:
        return False
    most = prompt_tokens * _CUT_CHARACTERS
    if sum(len(message["content"]) for message in messages) <= max(most, _CUT_FROM):
        return False
    counted = sum(len(_RUNS.sub(" ", message["content"])) for message in messages)
    return counted > max(most, _CUT_FROM)


def prompt_token_estimate(messages: Sequence[Message]) -> int:
    """A high estimate of the prompt's tokens: most tokenizers make less than one token of three bytes."""
    return sum(reply_token_estimate(message["content"]) + 7 for message in messages) + 8


def reply_token_estimate(text: str) -> int:
    """An estimate of the tokens of a reply, as high."""
    return len(text.encode("utf-8", "replace")) // 3 + 1
