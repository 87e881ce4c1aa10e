"""Rubric judges, the process critic and the pairwise judge.

Each is one coroutine: it asks, reads the whole reply, asks again when the reply cannot be read, and says what
happened. An answer that could not be judged has a status and no score.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pydantic import Field, field_validator, model_validator

from ray_pipeline.agents.replies import (
    Read,
    choice_grammar,
    critique_grammar,
    expected_score,
    read_choice,
    read_critique,
    read_score,
    score_grammar,
)
from ray_pipeline.agents.templates import Layout, RoleTemplate, fence, render, transcript
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine, Completion, EngineError, Grammar, Message, PromptTooLong, Sampling
from ray_pipeline.store.keys import derived_seed


class SamplingSettings(Settings):
    """How replies are drawn, by the names that engines use."""

    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus sampling: smallest set of tokens with this total probability"
    )
    max_tokens: int = Field(512, ge=1, description="maximum number of new tokens of a reply")
    extra: dict[str, Any] = Field(default_factory=dict, description="passed to the engine by its own names")

    def sampling(self, **more: Any) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            extra=tuple(sorted(self.extra.items())),
            **more,
        )


class Rubric(Settings):
    """One judge: what it looks at, on which scale, and on which model."""

    name: str = Field(description="name of the judge in the tables")
    text: str = Field("", description="what the judge looks at")
    low: int = Field(1, description="lowest score")
    high: int = Field(10, description="highest score")
    model: str | None = Field(None, description="a key of `models`; default: the stage's model")
    sampling: SamplingSettings | None = Field(None, description="default: the stage's; a key that is set here wins")

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
            raise ValueError(f"a judge's name is lower-case letters, digits, - and _, not {name!r}")
        return name

    @model_validator(mode="after")
    def _scale(self) -> Rubric:
        if self.low >= self.high:
            raise ValueError(f"judge {self.name}: low ({self.low}) must be under high ({self.high})")
        return self


class JudgeAsking(Settings):
    """How a judging role asks, whatever it judges."""

    grammar: bool = Field(True, description="force the reply's form while it is sampled")
    reason_chars: int = Field(400, ge=0, description="longest reason, in characters; 0 asks for the verdict alone")
    retries: int = Field(2, ge=0, description="how often an unreadable reply is asked for again")
    retry_temperature: float = Field(0.7, ge=0, description="temperature of a retry")
    expected_score: bool = Field(False, description="mean of the score under the judge's log-probabilities")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one judge says of one answer. `score` is None exactly when `parse_status` is not a read one."""

    score: float | None
    expected_score: float | None
    reason: str | None
    parse_status: str
    raw: str | None


@dataclasses.dataclass(frozen=True)
class Critique:
    """What the process critic says of one answer."""

    flawed: bool | None
    failure_type: str | None
    reason: str | None
    parse_status: str
    raw: str | None


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which of two answers a pairwise judge prefers: A, B, or C for a tie, in the order that it saw them."""

    choice: str | None
    reason: str | None
    parse_status: str
    raw: str | None


class Retries(Protocol):
    """How often an unreadable reply is asked for again, and how warm."""

    @property
    def retries(self) -> int: ...

    @property
    def retry_temperature(self) -> float: ...


async def judge(
    engine: ChatEngine,
    prompt: Sequence[Message],
    response: str,
    rubric: Rubric,
    template: RoleTemplate,
    sampling: SamplingSettings,
    asking: JudgeAsking,
    layout: Layout = "shared_first",
) -> Verdict:
    """Score one answer on one rubric."""
    instruction = transcript(prompt)
    messages = render(
        template,
        layout,
        instruction=instruction,
        response=response,
        fence=_fence(instruction, response),
        name=rubric.name,
        rubric=rubric.text,
        low=rubric.low,
        high=rubric.high,
    )
    grammar = score_grammar(rubric.low, rubric.high, asking.reason_chars) if asking.grammar else None
    # Twenty alternatives cover every score of a ten-point scale and what competes with them.
    logprobs = 20 if asking.expected_score else None
    read, reply, status = await ask_until_read(
        engine,
        messages,
        rubric.sampling or sampling,
        asking,
        grammar,
        lambda reply: read_score(reply, rubric.low, rubric.high),
        logprobs,
    )
    raw = None if reply is None else reply.text
    if read is None:
        return Verdict(None, None, None, status, raw)
    expected = None
    if reply is not None and asking.expected_score:
        expected = expected_score(reply.text, reply.logprobs, rubric.low, rubric.high)
    return Verdict(float(read.fields["score"]), expected, read.fields["reason"], status, raw)


async def critique(
    engine: ChatEngine,
    prompt: Sequence[Message],
    response: str,
    template: RoleTemplate,
    sampling: SamplingSettings,
    asking: JudgeAsking,
    layout: Layout = "shared_first",
) -> Critique:
    """Say whether the way to an answer is flawed, and how."""
    instruction = transcript(prompt)
    messages = render(template, layout, instruction=instruction, response=response, fence=_fence(instruction, response))
    grammar = critique_grammar(asking.reason_chars) if asking.grammar else None
    read, reply, status = await ask_until_read(engine, messages, sampling, asking, grammar, read_critique)
    raw = None if reply is None else reply.text
    if read is None:
        return Critique(None, None, None, status, raw)
    return Critique(read.fields["flawed"], read.fields["failure_type"], read.fields["reason"], status, raw)


async def compare(
    engine: ChatEngine,
    prompt: Sequence[Message],
    response_a: str,
    response_b: str,
    template: RoleTemplate,
    sampling: SamplingSettings,
    asking: JudgeAsking,
    layout: Layout = "shared_first",
) -> Choice:
    """Choose between two answers, shown in the given order. Callers ask in both orders."""
    instruction = transcript(prompt)
    messages = render(
        template,
        layout,
        instruction=instruction,
        response_a=response_a,
        response_b=response_b,
        fence=_fence(instruction, response_a, response_b),
    )
    grammar = choice_grammar(asking.reason_chars) if asking.grammar else None
    read, reply, status = await ask_until_read(engine, messages, sampling, asking, grammar, read_choice)
    raw = None if reply is None else reply.text
    if read is None:
        return Choice(None, None, status, raw)
    return Choice(read.fields["choice"], read.fields["reason"], status, raw)


def _fence(instruction: str, *answers: str) -> str:
    # Of the instruction alone wherever that will do: then all answers to it share the prompt's first part.
    return fence([instruction], [instruction, *answers])


async def ask_until_read(
    engine: ChatEngine,
    messages: list[Message],
    settings: SamplingSettings,
    asking: Retries,
    grammar: Grammar | None,
    reader: Callable[[Completion], Read | None],
    logprobs: int | None = None,
    follow_up: str | None = None,
    sample: int = 0,
) -> tuple[Read | None, Completion | None, str]:
    """Ask until a reply can be read or the retries are used up; returns what was read, the last reply, the status.

    A retry is another call (its own temperature and seed, both in the call key), because a greedy call would only
    give the same unreadable reply again. Nothing of an earlier reply is kept: the whole verdict is the last reply's.

    Args:
        follow_up: said to the model after its unreadable reply; None asks the same question again.
        sample: which of several replies to the same question this is; each is drawn with a seed of its own.
    """
    reply: Completion | None = None
    status, first = "unparsed", messages
    nth = (sample,) if sample else ()
    for attempt in range(asking.retries + 1):
        if follow_up is not None and reply is not None:
            said = [{"role": "assistant", "content": reply.text}, {"role": "user", "content": follow_up}]
            messages = [*first, *said]
        sampling = settings.sampling(grammar=grammar, logprobs=logprobs)
        if attempt:
            seed = derived_seed("retry", _contents(messages), attempt, *nth)
            sampling = dataclasses.replace(sampling, temperature=asking.retry_temperature, seed=seed)
        elif settings.temperature > 0:
            sampling = dataclasses.replace(sampling, seed=derived_seed("judge", _contents(messages), *nth))
        try:
            reply = await engine.chat(messages, sampling)
        except PromptTooLong:
            return None, None, "too_long"
        except EngineError as error:
            return None, Completion(f"{type(error).__name__}: {error}", "error", 0, 0, 0), "error"
        read = reader(reply)
        if read is not None:
            return read, reply, "repaired" if attempt else read.status
        status = "truncated" if reply.finish_reason == "length" else "unparsed"
    return None, reply, status


def _contents(messages: Sequence[Mapping[str, str]]) -> list[str]:
    return [m["content"] for m in messages]
