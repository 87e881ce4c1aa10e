"""The prompts of a perfect judge of the pocket world, and its replies, for every judging role.

The reply is JSON with the judge's own answer and its grade first and the verdict last. This order makes judging
learnable for so small a model (with the score alone, accuracy stalled at 73 %):

    rubric     {"reason": "2 7 9 wrong", "score": 2}
    critic     {"reason": "2 7 9 wrong", "failure_type": "unsupported", "flawed": true}
    pairwise   {"reason": "2 7 9 a right b wrong", "choice": "A"}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml

from ray_pipeline.pocket.tasks import FAILURES, RUBRICS, critique, grade, preference, rubric_scores, truth

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

    def single(self, role: str, instruction: str, response: str, layout: Layout = "shared_first") -> Judgement:
        """The prompt and reply of a rubric (role = its name) or the critic on one response."""
        kind = "critic" if role == "critic" else "judge"
        message = self._message(kind, layout, name=role, instruction=instruction, response=response)
        reason = f"{truth(instruction)} {grade(instruction, response)}"
        if role == "critic":
            flawed, failure = critique(instruction, response)
            reply = {"reason": reason, "failure_type": failure, "flawed": flawed}
        else:
            reply = {"reason": reason, "score": rubric_scores(instruction, response)[role]}
        return Judgement(role, message, json.dumps(reply))

    def pairwise(
        self, instruction: str, response_a: str, response_b: str, layout: Layout = "shared_first"
    ) -> Judgement:
        """The prompt and reply of a comparison of two responses."""
        message = self._message(
            "pairwise", layout, name="", instruction=instruction, response_a=response_a, response_b=response_b
        )
        reason = f"{truth(instruction)} a {grade(instruction, response_a)} b {grade(instruction, response_b)}"
        reply = {"reason": reason, "choice": preference(instruction, response_a, response_b)}
        return Judgement("pairwise", message, json.dumps(reply))

    def _message(self, kind: str, layout: Layout, **variables: str) -> str:
        shared, rubric = (template.render(low=1, high=10, rubric="", **variables) for template in self._parts[kind])
        return f"{shared}\n{rubric}" if layout == "shared_first" else f"{rubric}\n{shared}"
