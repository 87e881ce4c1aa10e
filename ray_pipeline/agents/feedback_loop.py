"""The feedback loop (generator and reviewers): an answer is reviewed, revised by the review, and reviewed again.

`review` and `revise` are one call each (a review is asked for again when it cannot be read), `next_step` is the rule
that says whether a loop goes on, and `feedback_loop` is all of them in one coroutine. The stages of a run use the same
three parts in turns, so that only one model need be loaded at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings, ask_until_read
from ray_pipeline.agents.replies import read_review, review_grammar
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
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine, Completion, EngineError, Message, Sampling
from ray_pipeline.store.keys import normalise_text
from ray_pipeline.store.schemas import READ_STATUSES

#: Why a loop has no further response: as many as asked for; no reviewer wants a change; the same feedback came before;
#: no review could be read; or the generator gave no answer.
Stop = Literal["limit", "empty", "repeated", "unread", "no_response"]


class FeedbackTemplates(Settings):
    """The texts of a feedback file. `review` is one message, its shared part first."""

    review: RoleTemplate
    revise: str


#: What the texts may use, with an example for checking a file before anything runs.
REVIEW_VARIABLES: dict[str, Any] = {
    "instruction": "x",
    "response": "x",
    "focus": "",
    "fence": "0",
    "reason": True,
    "score": True,
    "low": 1,
    "high": 10,
}
REVISE_VARIABLES: dict[str, Any] = {"feedback": "x", "response": "x", "instruction": "x"}


def load_feedback_templates(name_or_path: str) -> FeedbackTemplates:
    """Feedback texts by built-in name or from a YAML file. Raises TemplateError, naming file and block."""
    templates = read_template_file(name_or_path, FeedbackTemplates, "feedback")
    for given in (True, False):
        check_role(name_or_path, "review", templates.review, {**REVIEW_VARIABLES, "reason": given, "score": given})
    check_text(name_or_path, "revise", templates.revise, REVISE_VARIABLES)
    return templates


class ReviewAsking(Settings):
    """How a review is asked for."""

    grammar: bool = Field(True, description="force the reply's form while it is sampled")
    reason_chars: int = Field(400, ge=0, description="longest reason, in characters; 0 asks for none")
    feedback_chars: int = Field(1500, ge=1, description="longest feedback under a grammar, in characters")
    scored: bool = Field(
        False,
        description="the reviewer gives the answer a score, too. It is kept in the table; the loop does not read it",
    )
    low: int = Field(1, description="the scale of that score")
    high: int = Field(10, description="the scale of that score")
    retries: int = Field(2, ge=0, description="how often an unreadable reply is asked for again")
    retry_temperature: float = Field(0.7, ge=0, description="temperature of a retry")

    @model_validator(mode="after")
    def _scale(self) -> ReviewAsking:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be under high ({self.high})")
        return self

    @property
    def scale(self) -> tuple[int, int] | None:
        return (self.low, self.high) if self.scored else None


@dataclasses.dataclass(frozen=True)
class Review:
    """What a reviewer says of an answer.

    Attributes:
        feedback: what to change; "" when there is nothing to improve, None exactly when nothing could be read.
        score: how good the answer is, where the reviewer is asked for it.
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
        focus: what this reviewer looks at; empty is the template's own question.
        sample: which of several reviews of the same answer this is.
    """
    read, reply, status = await ask_until_read(
        engine,
        review_messages(prompt, response, template, asking, focus),
        sampling,
        asking,
        review_grammar(asking.reason_chars, asking.feedback_chars, asking.scale) if asking.grammar else None,
        lambda reply: read_review(reply, asking.scale),
        sample=sample,
    )
    raw = None if reply is None else reply.text
    if read is None:
        return Review(None, None, None, status, raw)
    score = read.fields["score"]
    return Review(read.fields["feedback"], None if score is None else float(score), read.fields["reason"], status, raw)


def review_messages(
    prompt: Sequence[Message], response: str, template: RoleTemplate, asking: ReviewAsking, focus: str = ""
) -> list[Message]:
    """What a reviewer is asked."""
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
    )


def revision_messages(prompt: Sequence[Message], response: str, feedback: str, template: str) -> list[Message]:
    """The conversation that a revision answers: the prompt, the answer as the assistant's turn, the feedback as the
    user's."""
    asked = {"feedback": feedback, "response": response, "instruction": transcript(prompt)}
    said = {"role": "assistant", "content": response}
    return [*map(dict, prompt), said, {"role": "user", "content": render_text(template, asked)}]


def next_step(reviews: Sequence[Review], earlier: Sequence[str]) -> tuple[str, None] | tuple[None, Stop]:
    """What to revise by, or why the loop stops.

    Args:
        reviews: of the last response, by all reviewers. Their feedback is put together in this order; those that
            want no change and those that could not be read add nothing.
        earlier: feedback by which this prompt's answer was revised before.
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
    """Feedback as it is compared: spelling of blanks and case make no difference."""
    return " ".join(normalise_text(feedback).casefold().split())


@dataclasses.dataclass(frozen=True)
class Reviewer:
    """One reviewer: who answers, how replies are drawn, and what it looks at."""

    engine: ChatEngine
    sampling: SamplingSettings
    focus: str = ""


@dataclasses.dataclass(frozen=True)
class Loop:
    """All responses, first to last, the reviews of each of them by reviewer (none of the last), and why it ended."""

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
) -> Loop:
    """Answer a prompt, and improve the answer by its reviews.

    Args:
        responses: how many responses there are at most; one fewer are reviewed.
        sampling: how response number k (0 is the first) is drawn.

    Raises:
        ValueError: there is no reviewer, or no response is asked for.
    """
    if not reviewers or responses < 1:
        raise ValueError("a feedback loop needs one or more reviewers and one or more responses")
    messages: list[Message] = [dict(m) for m in prompt]
    given: list[Completion] = []
    said: list[dict[str, Review]] = []
    earlier: list[str] = []
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
        messages = revision_messages(prompt, reply.text, feedback, templates.revise)


async def respond(engine: ChatEngine, messages: Sequence[Message], sampling: Sampling) -> Completion | EngineError:
    """One answer of the generator, or the error that stood in its place."""
    try:
        return await engine.chat(messages, sampling)
    except EngineError as error:  # PromptTooLong is one
        return error
