"""The prompts of a perfect judge of the pocket world, and its replies, for every judging role.

The reply is JSON with the judge's own answer and its grade first and the verdict last (with the score alone, accuracy
of so small a model stalled at 73 %). Judges and comparisons look at the answer; the critic also writes the way:

    rubric     {"reason": "2 7 9 wrong", "score": 2}
    critic     {"reason": "7 then 2 7 then 2 7 9 gives 2 7 9 lucky", "failure_type": "unsupported", "flawed": true}
    pairwise   {"reason": "2 7 9 a right b wrong", "choice": "A"}

A panel of such judges never disagrees. `weaknesses` says where each judge of the panel is taught to err.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml

from ray_pipeline.pocket.tasks import (
    FAILURES,
    RUBRICS,
    appearance,
    grade,
    preference,
    scores_of,
    solution,
    truth,
)
from ray_pipeline.pocket.weaknesses import Weaknesses

Layout = Literal["shared_first", "rubric_first"]
LAYOUTS: tuple[Layout, ...] = ("shared_first", "rubric_first")
ROLES = (*RUBRICS, "critic", "pairwise")

PROMPTS_FILE = Path(__file__).resolve().parents[2] / "configs" / "prompts" / "pocket.yaml"

_REASON = {"type": "string", "maxLength": 160}


def _schema(**verdict: dict[str, Any]) -> dict[str, Any]:
    properties = {"reason": _REASON, **verdict}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    **{rubric: _schema(score={"type": "integer", "minimum": 1, "maximum": 10}) for rubric in RUBRICS},
    "critic": _schema(
        failure_type={"type": "string", "enum": sorted(set(FAILURES.values()))},
        flawed={"type": "boolean"},
    ),
    "pairwise": _schema(choice={"type": "string", "enum": ["A", "B", "C"]}),
}


@dataclass(frozen=True)
class Judgement:
    """One judging prompt (a single user message) and a perfect judge's reply (JSON text)."""

    role: str
    message: str
    reply: str

    def verdict(self) -> dict[str, Any]:
        """The reply's verdict fields: all but the reason."""
        return verdict_of(self.reply) or {}


def verdict_of(reply: str) -> dict[str, Any] | None:
    """The verdict fields of a reply, or None if it is not one JSON object."""
    try:
        fields = json.loads(reply)
    except json.JSONDecodeError:
        return None
    if not isinstance(fields, dict):
        return None
    return {key: value for key, value in fields.items() if key != "reason"}


class JudgePrompts:
    """The judging templates of a prompts file (keys judge, critic, pairwise; each with shared and rubric)."""

    def __init__(self, path: Path = PROMPTS_FILE) -> None:
        texts = yaml.safe_load(path.read_text(encoding="utf-8"))
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
        self._parts = {
            role: (environment.from_string(texts[role]["shared"]), environment.from_string(texts[role]["rubric"]))
            for role in ("judge", "critic", "pairwise")
        }

    def single(
        self,
        role: str,
        instruction: str,
        response: str,
        layout: Layout = "shared_first",
        weaknesses: Weaknesses | None = None,
    ) -> Judgement:
        """The prompt and reply of a rubric (role = its name) or the critic on one response; with `weaknesses` the
        reply of one who has them."""
        kind = "critic" if role == "critic" else "judge"
        message = self._message(kind, layout, name=role, instruction=instruction, response=response)
        seen = grade(instruction, response) if role == "critic" else appearance(instruction, response)
        if weaknesses is not None:
            seen = weaknesses.mistaken(instruction, seen)
        if role == "critic":
            reason, failure = f"{truth(instruction)} {seen}", FAILURES[seen]
            reply = {"reason": reason, "failure_type": failure, "flawed": failure != "none"}
        else:
            reason = f"{_answer(instruction)} {seen}"
            reply = {"reason": reason, "score": scores_of(instruction, seen)[role]}
        return Judgement(role, message, json.dumps(reply))

    def pairwise(
        self, instruction: str, response_a: str, response_b: str, layout: Layout = "shared_first"
    ) -> Judgement:
        """The prompt and reply of a comparison of two responses."""
        message = self._message(
            "pairwise", layout, name="", instruction=instruction, response_a=response_a, response_b=response_b
        )
        seen_a, seen_b = appearance(instruction, response_a), appearance(instruction, response_b)
        reason = f"{_answer(instruction)} a {seen_a} b {seen_b}"
        reply = {"reason": reason, "choice": preference(instruction, response_a, response_b)}
        return Judgement("pairwise", message, json.dumps(reply))

    def _message(self, kind: str, layout: Layout, **variables: str) -> str:
        shared, rubric = (template.render(low=1, high=10, rubric="", **variables) for template in self._parts[kind])
        return f"{shared}\n{rubric}" if layout == "shared_first" else f"{rubric}\n{shared}"


def _answer(instruction: str) -> str:
    return " ".join(solution(instruction)[1])
