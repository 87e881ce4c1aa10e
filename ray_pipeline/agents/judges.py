"""Rubric judges, the process critic and the pairwise judge.

Each is one coroutine: it calls the engine, parses the whole reply, and retries when the reply cannot be read. The
result always has a parse status; an answer that could not be judged has no score.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pydantic import Field, field_validator, model_validator

from ray_pipeline.agents.checklists import MOST_ITEMS, ChecklistSettings, Item
from ray_pipeline.agents.labelled_replies import pick_grammar
from ray_pipeline.agents.replies import (
    Read,
    choice_verdict,
    critique_grammar,
    critique_verdict,
    expected_score,
    score_grammar,
    score_verdict,
)
from ray_pipeline.agents.templates import Layout, RoleTemplate, fence, render, transcript
from ray_pipeline.agents.verdict_styles import FORMATS_OF_OBJECTS, Format
from ray_pipeline.agents.verdicts import Unread
from ray_pipeline.config.settings import NewTokens, Settings, Temperature
from ray_pipeline.engines.base import (
    ChatEngine,
    Completion,
    EngineError,
    Grammar,
    Message,
    PromptTooLong,
    Sampling,
    TokenLogprobs,
)
from ray_pipeline.engines.thoughts import as_verdict
from ray_pipeline.store.keys import derived_seed


class SamplingSettings(Settings):
    """Sampling of replies, with the engines' parameter names."""

    temperature: Temperature = Field(0.0, description="0 is greedy")
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus sampling: smallest set of tokens with this total probability"
    )
    max_tokens: NewTokens = Field(512, description="maximum number of new tokens of a reply")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="further parameters, passed to the engine unchanged"
    )

    def sampling(self, **more: Any) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            extra=tuple(sorted(self.extra.items())),
            **more,
        )


class Rubric(Settings):
    """One judge: its criterion, its scale and its model."""

    name: str = Field(description="name of the judge in the tables")
    text: str = Field("", description="criterion that the judge applies")
    items: tuple[Item, ...] = Field(
        (),
        max_length=MOST_ITEMS,
        description="checklist: requirements that the judge ticks one by one in one call; each a text, or `text` and "
        "`weight`. The score is the weighted share that is met",
    )
    checklist: ChecklistSettings | None = Field(
        None, description="checklist whose items a model writes for each prompt; `text` is what it should look at"
    )
    low: int = Field(1, description="lowest score")
    high: int = Field(10, description="highest score")
    model: str | None = Field(None, description="a key of `models`; default: the stage's model")
    sampling: SamplingSettings | None = Field(
        None, description="default: the stage's; keys that are set here override it"
    )

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
            raise ValueError(
                f"invalid judge name {name!r}; use lower-case letters, digits, - and _, starting with a letter"
            )
        return name

    @model_validator(mode="after")
    def _scale(self) -> Rubric:
        if self.low >= self.high:
            raise ValueError(f"judge {self.name}: low ({self.low}) must be less than high ({self.high})")
        return self

    @model_validator(mode="after")
    def _one_checklist(self) -> Rubric:
        if self.items and self.checklist is not None:
            raise ValueError(f"judge {self.name}: items are given and written by a model (checklist); remove one")
        return self

    @property
    def is_checklist(self) -> bool:
        return bool(self.items) or self.checklist is not None

    def scaled(self, share: float) -> float:
        """A share from 0 to 1 on the judge's scale."""
        return self.low + share * (self.high - self.low)


class JudgeAsking(Settings):
    """Settings of a judging call, whatever the role."""

    grammar: bool = Field(True, description="constrain the reply to its JSON form while sampling")
    reason_chars: int = Field(
        400, ge=0, description="maximum length of the reason in characters; 0 for the verdict alone"
    )
    format: Format = Field("quorum", description="house style in which scores and choices are read; auto: any")
    retries: int = Field(2, ge=0, description="maximum number of retries of an unreadable reply")
    retry_temperature: Temperature = Field(0.7, description="temperature of a retry")
    expected_score: bool = Field(False, description="also compute the mean score under the judge's log-probabilities")

    @model_validator(mode="after")
    def _format(self) -> JudgeAsking:
        refuse_grammar(self.grammar, self.format)
        return self


def refuse_grammar(grammar: bool, format: Format) -> None:
    """Raise ValueError if replies are constrained to JSON, but read in a format without it."""
    if grammar and format not in FORMATS_OF_OBJECTS:
        raise ValueError(f"format {format} has no grammar; set grammar: false, or format: quorum")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One judge's verdict on one answer. `score` is None exactly when `parse_status` is not `ok` or `repaired`.

    Attributes:
        unread: why the reply has no verdict (`unread: contradictory`), where it ended by itself; in rows, its `reason`.
    """

    score: float | None
    expected_score: float | None
    reason: str | None
    parse_status: str
    raw: str | None
    unread: str | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Critique:
    """The process critic's verdict on one answer."""

    flawed: bool | None
    failure_type: str | None
    reason: str | None
    parse_status: str
    raw: str | None
    unread: str | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which of two answers a pairwise judge prefers: A, B, or C for a tie, in the order shown to it."""

    choice: str | None
    reason: str | None
    parse_status: str
    raw: str | None
    unread: str | None = dataclasses.field(default=None, compare=False)


def columns_of(found: Verdict | Critique | Choice) -> dict[str, Any]:
    """Columns of a row; the reason of an unread reply is why it is unread."""
    columns = dict(vars(found))
    unread = columns.pop("unread")
    return {**columns, "reason": columns["reason"] or unread}


class Retries(Protocol):
    """The number of retries of an unreadable reply, and their temperature."""

    @property
    def retries(self) -> int: ...

    @property
    def retry_temperature(self) -> float: ...


def judge_messages(
    prompt: Sequence[Message], response: str, rubric: Rubric, template: RoleTemplate, layout: Layout
) -> list[Message]:
    """What a judge of one rubric is asked about one answer."""
    instruction = transcript(prompt)
    return render(
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
    messages = judge_messages(prompt, response, rubric, template, layout)
    grammar = score_grammar(rubric.low, rubric.high, asking.reason_chars) if asking.grammar else None
    reader = functools.partial(score_verdict, low=rubric.low, high=rubric.high, format=asking.format)
    # Twenty alternatives cover every score of a ten-point scale and the tokens that compete with them.
    logprobs = 20 if asking.expected_score else None
    reply = await ask_until_read(engine, messages, rubric.sampling or sampling, asking, grammar, reader, logprobs)
    if reply.fields is None:
        return Verdict(None, None, None, reply.status, reply.raw, reply.unread)
    expected = None
    if reply.raw is not None and asking.expected_score:
        expected = expected_score(reply.raw, reply.logprobs, rubric.low, rubric.high)
    return Verdict(float(reply.fields["score"]), expected, reply.fields["reason"], reply.status, reply.raw)


async def critique(
    engine: ChatEngine,
    prompt: Sequence[Message],
    response: str,
    template: RoleTemplate,
    sampling: SamplingSettings,
    asking: JudgeAsking,
    layout: Layout = "shared_first",
) -> Critique:
    """Decide whether the reasoning behind an answer is flawed, and how."""
    instruction = transcript(prompt)
    messages = render(template, layout, instruction=instruction, response=response, fence=_fence(instruction, response))
    grammar = critique_grammar(asking.reason_chars) if asking.grammar else None
    reply = await ask_until_read(engine, messages, sampling, asking, grammar, critique_verdict)
    if reply.fields is None:
        return Critique(None, None, None, reply.status, reply.raw, reply.unread)
    return Critique(**reply.fields, parse_status=reply.status, raw=reply.raw)


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
    """Choose between two answers, shown in the given order. Callers compare in both orders."""
    instruction = transcript(prompt)
    messages = render(
        template,
        layout,
        instruction=instruction,
        response_a=response_a,
        response_b=response_b,
        fence=_fence(instruction, response_a, response_b),
    )
    grammar = pick_grammar(("A", "B", "C"), asking.reason_chars) if asking.grammar else None
    reader = functools.partial(choice_verdict, format=asking.format)
    reply = await ask_until_read(engine, messages, sampling, asking, grammar, reader)
    if reply.fields is None:
        return Choice(None, None, reply.status, reply.raw, reply.unread)
    return Choice(**reply.fields, parse_status=reply.status, raw=reply.raw)


def _fence(instruction: str, *answers: str) -> str:
    # Derived from the instruction alone, so that the prompts of all its answers share a prefix.
    return fence([instruction], [instruction, *answers])


@dataclasses.dataclass(frozen=True)
class JudgeReply:
    """The last reply of a judge to a question, and what was read from it.

    Attributes:
        fields: by name, the reason included; None exactly when `status` is not a read one.
        status: the parse status.
        raw: its text, or that of the error of a failed call; None where the prompt is too long.
        unread: why a reply that ended by itself is unread (`unread: contradictory`), for the column `reason`.
        finished: the reply itself; None for a call without one.
    """

    fields: dict[str, Any] | None
    status: str
    raw: str | None = None
    unread: str | None = None
    finished: Completion | None = None

    @property
    def logprobs(self) -> TokenLogprobs | None:
        return None if self.finished is None else self.finished.logprobs

    @property
    def reason(self) -> str | None:
        """The judge's reason, or why there is no verdict."""
        return self.unread if self.fields is None else self.fields["reason"]


async def ask_until_read(
    engine: ChatEngine,
    messages: list[Message],
    settings: SamplingSettings,
    asking: Retries,
    grammar: Grammar | None,
    reader: Callable[[Completion], Read | Unread | None],
    logprobs: int | None = None,
    follow_up: str | None = None,
    sample: int = 0,
) -> JudgeReply:
    """Call until a reply can be read or the retries are used up.

    A retry has its own temperature and seed (both in the call key), because repeating a greedy call would return the
    same unreadable reply. Nothing of an earlier reply is used: the verdict comes from the last reply alone.

    Args:
        follow_up: user message sent after an unreadable reply; None repeats the question.
        sample: index among several replies to the same question; each has its own seed.
    """
    reply: Completion | None = None
    first = messages
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
            reply = as_verdict(await engine.chat(messages, sampling))
        except PromptTooLong:
            return JudgeReply(None, "too_long")
        except EngineError as error:
            return JudgeReply(None, "error", f"{type(error).__name__}: {error}")
        read = reader(reply)
        if isinstance(read, Read):
            return JudgeReply(read.fields, "repaired" if attempt else read.status, reply.text, finished=reply)
    assert reply is not None  # `retries` is 0 or more
    if reply.finish_reason == "length":
        return JudgeReply(None, "truncated", reply.text, finished=reply)
    read = reader(Completion(reply.text, "stop", 0, 0, 0))
    return JudgeReply(None, "unparsed", reply.text, read.reason if isinstance(read, Unread) else None, reply)


def _contents(messages: Sequence[Mapping[str, str]]) -> list[str]:
    return [m["content"] for m in messages]
