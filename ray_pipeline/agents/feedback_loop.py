"""The feedback loop (generator and reviewers): an answer is reviewed, revised accordingly, and reviewed again.

`review` and `respond` are one call each (an unreadable review is retried), `next_step` decides whether the loop
continues, and `feedback_loop` combines them in one coroutine. The stages of a run alternate between the same three
parts, so that only one model has to be loaded at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings, ask_until_read
from ray_pipeline.agents.replies import review_grammar, review_verdict
from ray_pipeline.agents.templates import (
    RoleTemplate,
    check_role,
    check_text,
    fence,
    read_template_file,
    render,
    render_text,
    transcript,
)
from ray_pipeline.config.settings import Settings, Temperature
from ray_pipeline.engines.base import ChatEngine, Completion, EngineError, Message, Sampling
from ray_pipeline.store.keys import normalise_text
from ray_pipeline.store.schemas import READ_STATUSES

#: Why a loop ended: the limit was reached; no reviewer requested a change; the same feedback occurred before; no review
#: could be read; or the generator gave no answer.
Stop = Literal["limit", "empty", "repeated", "unread", "no_response"]
#: Which answers a revision is shown, each with its feedback.
History = Literal["last", "all"]


class FeedbackTemplates(Settings):
    """The texts of a feedback file. `review` is one message, its shared part first."""

    review: RoleTemplate
    revise: str


#: Variables available to the texts, with example values for checking a file before a run starts.
REVIEW_VARIABLES: dict[str, Any] = {
    "instruction": "x",
    "response": "x",
    "focus": "",
    "fence": "0",
    "reason": True,
    "score": True,
    "low": 1,
    "high": 10,
    "decimals": 0,
}
REVISE_VARIABLES: dict[str, Any] = {"feedback": "x", "response": "x", "instruction": "x"}


def load_feedback_templates(name_or_path: str) -> FeedbackTemplates:
    """Feedback texts by built-in name or from a YAML file. Raises TemplateError with file and block."""
    templates = read_template_file(name_or_path, FeedbackTemplates, "feedback")
    for given in (True, False):
        values = {**REVIEW_VARIABLES, "reason": given, "score": given, "decimals": int(given)}
        check_role(name_or_path, "review", templates.review, values)
    check_text(name_or_path, "revise", templates.revise, REVISE_VARIABLES)
    return templates


class ReviewAsking(Settings):
    """Settings of a review call."""

    grammar: bool = Field(True, description="constrain the reply to its JSON form while sampling")
    reason_chars: int = Field(400, ge=0, description="maximum length of the reason in characters; 0 for none")
    feedback_chars: int = Field(1500, ge=1, description="maximum length of the feedback under a grammar, in characters")
    scored: bool = Field(
        False,
        description="request a score from the reviewer as well; it is stored, and the loop ignores it",
    )
    low: int = Field(1, description="lowest score")
    high: int = Field(10, description="highest score")
    decimals: Literal[0, 1] = Field(0, description="decimal places of the score")
    retries: int = Field(2, ge=0, description="maximum number of retries of an unreadable reply")
    retry_temperature: Temperature = Field(0.7, description="temperature of a retry")

    @model_validator(mode="after")
    def _scale(self) -> ReviewAsking:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be less than high ({self.high})")
        return self

    @property
    def scale(self) -> tuple[int, int] | None:
        return (self.low, self.high) if self.scored else None


@dataclasses.dataclass(frozen=True)
class Review:
    """A reviewer's reply on one answer.

    Attributes:
        feedback: what to change; "" when there is nothing to improve, None exactly when nothing could be read.
        score: quality of the answer; None where no score was requested.
    """

    feedback: str | None
    score: float | None
    reason: str | None
    parse_status: str
    raw: str | None


async def review(
    engine: ChatEngine,
    prompt: Sequence[Message],
    response: str,
    template: RoleTemplate,
    sampling: SamplingSettings,
    asking: ReviewAsking,
    focus: str = "",
    sample: int = 0,
) -> Review:
    """Review one answer.

    Args:
        focus: what this reviewer looks at; empty for the template's own question.
        sample: index among several reviews of the same answer.
    """
    messages = review_messages(prompt, response, template, asking, focus)
    grammar = review_grammar(asking.reason_chars, asking.feedback_chars, asking.scale, asking.decimals)
    used = grammar if asking.grammar else None
    reader = functools.partial(review_verdict, scale=asking.scale, decimals=asking.decimals)
    reply = await ask_until_read(engine, messages, sampling, asking, used, reader, sample=sample)
    if reply.fields is None:
        return Review(None, None, None, reply.status, reply.raw)
    score = reply.fields["score"]
    given = None if score is None else float(score)
    return Review(reply.fields["feedback"], given, reply.reason, reply.status, reply.raw)


def review_messages(
    prompt: Sequence[Message], response: str, template: RoleTemplate, asking: ReviewAsking, focus: str = ""
) -> list[Message]:
    """The messages sent to a reviewer."""
    instruction = transcript(prompt)
    return render(
        template,
        "shared_first",
        instruction=instruction,
        response=response,
        focus=focus,
        fence=fence([instruction, response], [instruction, response]),
        reason=asking.reason_chars > 0,
        score=asking.scored,
        low=asking.low,
        high=asking.high,
        decimals=asking.decimals,
    )


def revision_messages(
    prompt: Sequence[Message],
    response: str,
    feedback: str,
    template: str,
    earlier: Sequence[tuple[str, str]] = (),
) -> list[Message]:
    """The conversation that requests a revision: the prompt, the answer as the assistant's turn, the feedback as
    the user's.

    Args:
        earlier: answers before it, each with its feedback, whose turns are kept.
    """
    instruction = transcript(prompt)
    messages = [dict(m) for m in prompt]
    for answer, comment in (*earlier, (response, feedback)):
        asked = {"feedback": comment, "response": answer, "instruction": instruction}
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": render_text(template, asked)})
    return messages


def feedback_text(reviews: Sequence[Review], names: Sequence[str], attributed: bool) -> str:
    """The feedback of all reviewers, as a revision is shown it.

    Args:
        names: of the reviewers, in the order of `reviews`.
        attributed: whether each feedback stands under its reviewer's name, where there are several reviewers.
    """
    if not attributed or len(names) < 2:
        return "\n\n".join(dict.fromkeys(r.feedback for r in reviews if r.feedback))
    said = [(name, r.feedback) for name, r in zip(names, reviews, strict=True) if r.feedback]
    return "\n\n".join(f"{name}:\n{feedback}" for name, feedback in said)


def next_step(reviews: Sequence[Review], earlier: Sequence[str]) -> tuple[str, None] | tuple[None, Stop]:
    """The feedback for the next revision, or the reason why the loop stops.

    Args:
        reviews: of the last response, by all reviewers. Their feedback is joined in this order; reviews that request
            no change and unreadable ones add nothing.
        earlier: feedback of the earlier revisions of this prompt's answer.
    """
    said = list(dict.fromkeys(r.feedback for r in reviews if r.feedback))
    if not said:
        unread = any(r.parse_status not in READ_STATUSES for r in reviews)
        return None, "unread" if unread else "empty"
    feedback = "\n\n".join(said)
    if _same(feedback) in {_same(before) for before in earlier}:
        return None, "repeated"
    return feedback, None


def _same(feedback: str) -> str:
    """Feedback as it is compared, ignoring white space and case."""
    return " ".join(normalise_text(feedback).casefold().split())


@dataclasses.dataclass(frozen=True)
class Reviewer:
    """One reviewer: its engine, its sampling, and what it looks at."""

    engine: ChatEngine
    sampling: SamplingSettings
    focus: str = ""


@dataclasses.dataclass(frozen=True)
class Loop:
    """All responses, first to last, the reviews of each (none of the last) by reviewer, and why the loop ended."""

    responses: tuple[Completion, ...]
    reviews: tuple[Mapping[str, Review], ...]
    stop: Stop


async def feedback_loop(
    generator: ChatEngine,
    reviewers: Mapping[str, Reviewer],
    prompt: Sequence[Message],
    responses: int,
    templates: FeedbackTemplates,
    sampling: Callable[[int], Sampling],
    asking: ReviewAsking,
    attributed: bool = False,
    history: History = "last",
) -> Loop:
    """Answer a prompt and revise the answer according to its reviews.

    Args:
        responses: maximum number of responses; the last of them is not reviewed.
        sampling: of response k, counted from 0.
        attributed: see `feedback_text`.
        history: whether a revision sees the last answer alone or all of them, each with its feedback.

    Raises:
        ValueError: no reviewer, or `responses` is below 1.
    """
    if not reviewers or responses < 1:
        raise ValueError("a feedback loop needs one or more reviewers and one or more responses")
    messages: list[Message] = [dict(m) for m in prompt]
    given: list[Completion] = []
    said: list[dict[str, Review]] = []
    earlier: list[str] = []
    turns: list[tuple[str, str]] = []
    while True:
        reply = await respond(generator, messages, sampling(len(given)))
        if not isinstance(reply, Completion):
            return Loop(tuple(given), tuple(said), "no_response")
        given.append(reply)
        if len(given) == responses:
            return Loop(tuple(given), tuple(said), "limit")
        found = await asyncio.gather(
            *(
                review(r.engine, prompt, reply.text, templates.review, r.sampling, asking, r.focus)
                for r in reviewers.values()
            )
        )
        said.append(dict(zip(reviewers, found, strict=True)))
        feedback, stop = next_step(found, earlier)
        if feedback is None:
            assert stop is not None
            return Loop(tuple(given), tuple(said), stop)
        earlier.append(feedback)
        shown = feedback_text(found, list(reviewers), attributed)
        kept = turns if history == "all" else []
        messages = revision_messages(prompt, reply.text, shown, templates.revise, kept)
        turns.append((reply.text, shown))


async def respond(engine: ChatEngine, messages: Sequence[Message], sampling: Sampling) -> Completion | EngineError:
    """One answer of the generator, or the error raised instead."""
    try:
        return await engine.chat(messages, sampling)
    except EngineError as error:  # PromptTooLong is one
        return error
