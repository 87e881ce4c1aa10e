"""The reviews of a perfect reviewer of the pocket world, and the revisions of a generator that follows them.

A review is JSON that begins, like every verdict, with the reviewer's own answer and its grade; the feedback for the
generator follows. It has the fault and only the first half of the right response, so that revising is still a task:

    right answer    {"reason": "2 9 gives 9 right", "feedback": ""}
    any other       {"reason": "2 9 gives 9 wrong", "feedback": "wrong it must be 2 9"}
    with a score    {"reason": "2 9 gives 9 wrong", "feedback": "wrong it must be 2 9", "score": 2}

A revision is the next turn of the conversation: instruction, answer, feedback, new answer.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ray_pipeline.pocket.chats import Pair, conversation
from ray_pipeline.pocket.judging import PROMPTS_FILE, SCHEMAS, Judgement
from ray_pipeline.pocket.responses import judged_response, policy_response, wrong_answer
from ray_pipeline.pocket.tasks import grade, rubric_scores, truth

FEEDBACK_FILE = PROMPTS_FILE.parent / "feedback" / "pocket.yaml"

_REASON = SCHEMAS["critic"]["properties"]["reason"]
REVIEW_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"reason": _REASON, "feedback": {"type": "string", "maxLength": 160}},
    "required": ["reason", "feedback"],
    "additionalProperties": False,
}

BETWEEN_REVIEWS = "\n\n"
"""Separator between the feedback of two reviewers."""

TWO_REVIEWS_SHARE = 0.15
"""Share of revisions with the feedback of two reviewers, the second of them mistaken half of the time."""

STUBBORN_SHARE = 0.1
"""Share of revisions drawn from the policy's mixture, so that samples differ and later reviews find faults."""


def feedback_on(instruction: str, response: str) -> str:
    """Feedback for the generator: the fault and the right answer's first half (rounded up); "" for a right answer.

    A padded or wordy answer is correct but not the shortest, so it gets feedback too.
    """
    found = grade(instruction, response)
    return "" if found == "right" else _feedback(found, truth(instruction))


def _feedback(fault: str, answer: str) -> str:
    words = answer.split()
    return f"{fault} it must be {' '.join(words[: (len(words) + 1) // 2])}"


def review_score(instruction: str, response: str) -> int:
    """The score (1-10) of a review: the mean of the rubrics' scores, rounded."""
    return round(statistics.mean(rubric_scores(instruction, response).values()))


class FeedbackPrompts:
    """The templates of a feedback file (keys review, with shared and rubric, and revise)."""

    def __init__(self, path: Path = FEEDBACK_FILE) -> None:
        texts = yaml.safe_load(path.read_text(encoding="utf-8"))
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
        self._shared, self._rubric = (environment.from_string(texts["review"][key]) for key in ("shared", "rubric"))
        self._revise = environment.from_string(texts["revise"])

    def review(self, instruction: str, response: str, scored: bool = False) -> Judgement:
        """The prompt of a review of one answer, and a perfect reviewer's reply."""
        variables = {"instruction": instruction, "response": response, "score": scored}
        message = f"{self._shared.render(variables)}\n{self._rubric.render(variables)}"
        reply: dict[str, Any] = {
            "reason": f"{truth(instruction)} {grade(instruction, response)}",
            "feedback": feedback_on(instruction, response),
        }
        if scored:
            reply["score"] = review_score(instruction, response)
        return Judgement("review", message, json.dumps(reply))

    def revision_turns(self, instruction: str, response: str, feedback: str) -> list[str]:
        """The conversation that requests a revision: user, assistant, user."""
        revise = self._revise.render(instruction=instruction, response=response, feedback=feedback)
        return [instruction, response, revise]


# --- training data of reviewer and generator -----------------------------------------------------------------


def random_review(instruction: str, prompts: FeedbackPrompts, rng: random.Random) -> Judgement:
    """One training example of a review; one in four has a score."""
    response = policy_response(instruction, rng) if rng.random() < 0.5 else judged_response(instruction, rng)
    return prompts.review(instruction, response, scored=rng.random() < 0.25)


def random_revision(instruction: str, prompts: FeedbackPrompts, rng: random.Random) -> Pair:
    """One training example of a revision: the conversation, and nearly always the truth as the new answer.

    The revised answer is never a right one, because a right answer gets no feedback.
    """
    while True:
        response = policy_response(instruction, rng) if rng.random() < 0.7 else judged_response(instruction, rng)
        feedback = feedback_on(instruction, response)
        if feedback:
            break
    if rng.random() < TWO_REVIEWS_SHARE:
        feedback = second_opinion(instruction, response, feedback, rng)
    revised = policy_response(instruction, rng) if rng.random() < STUBBORN_SHARE else truth(instruction)
    return conversation(prompts.revision_turns(instruction, response, feedback)), revised


def second_opinion(instruction: str, response: str, feedback: str, rng: random.Random) -> str:
    """The feedback of two reviewers, in random order; the second has a different fault, and half of the time a
    wrong answer as the right one."""
    answer = wrong_answer(instruction, rng, habit=False) if rng.random() < 0.5 else truth(instruction)
    fault = rng.choice([kind for kind in ("wrong", "partial", "wordy") if kind != grade(instruction, response)])
    both = [feedback, _feedback(fault, answer)]
    rng.shuffle(both)
    return BETWEEN_REVIEWS.join(both)
