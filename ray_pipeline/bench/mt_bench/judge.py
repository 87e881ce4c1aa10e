"""MT-Bench's judge, which grades an answer or compares two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ray_pipeline.agents.judges import SamplingSettings, ask_until_read
from ray_pipeline.agents.replies import Read
from ray_pipeline.bench.judge_prompts import BenchPrompt
from ray_pipeline.bench.mt_bench.replies import (
    Reading,
    read_bracketed_choice,
    read_rating,
    rules_differ,
)
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine, Completion, Grammar, Message

LOW, HIGH = 1.0, 10.0
#: Replies under `BenchAsking.grammar`.
_RATING, _CHOICE = r"Rating: \[\[(10|[1-9])\]\]", r"\[\[[ABC]\]\]"

Turn = Literal[1, 2]


class BenchAsking(Settings):
    """Calls of MT-Bench's judge. The defaults are the published ones, except for the reading rule.

    With `unanimous` a reply that holds two verdicts, or that was cut off, is unread instead of taken at its first one,
    which an answer could have planted; the two rules read alike where no reply is `contradictory`.

    `grammar` forces the reply to be the verdict alone, without the explanation that the published judge gives first:
    for judges that are too small to follow the format.
    """

    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=2048)
    reading: Reading = Field("unanimous", description="which reader takes the grade from the reply")
    retries: int = Field(0, ge=0, description="retries of an unreadable reply; published: none")
    retry_temperature: float = Field(0.7, ge=0, description="temperature of a retry")
    grammar: bool = Field(False, description="force the reply's form while it is sampled")


@dataclasses.dataclass(frozen=True)
class Rating:
    """A judge's rating of one turn. `score` is None exactly if `parse_status` is not a read one.

    `contradictory`: the published rule takes a score from the reply, and the stricter one does not, because the reply
    holds two different verdicts or was cut off.
    """

    score: float | None
    parse_status: str
    contradictory: bool
    raw: str | None


@dataclasses.dataclass(frozen=True)
class TurnChoice:
    """Which of two answers to a turn is better: A, B, or C for a tie, in the order shown; None when unread."""

    choice: str | None
    parse_status: str
    contradictory: bool
    raw: str | None


async def rate_turn(
    engine: ChatEngine,
    prompts: Mapping[str, BenchPrompt],
    turn: Turn,
    questions: Sequence[str],
    answers: Sequence[str | None],
    references: Sequence[str] | None,
    asking: BenchAsking,
) -> Rating:
    """Grade the answer to one turn from 1 to 10; turn 2 is shown with turn 1 before it.

    Args:
        references: reference answers to both turns, for the categories that are graded against one.
    """
    fields = _question_fields(turn, questions, references) | _answers("answer", turn, answers)
    name = f"single-{'math-v1' if references else 'v1'}{'-multi-turn' if turn == 2 else ''}"
    if _unanswered(turn, answers):
        return Rating(None, "skipped", False, None)
    read, status, contradictory, raw = await _ask(engine, prompts[name].messages(fields), asking, _RATING, _rating)
    return Rating(None if read is None else float(read["score"]), status, contradictory, raw)


def _rating(reply: Completion, reading: Reading) -> Read | None:
    return read_rating(reply, reading, LOW, HIGH)


async def compare_turn(
    engine: ChatEngine,
    prompts: Mapping[str, BenchPrompt],
    turn: Turn,
    questions: Sequence[str],
    answers_a: Sequence[str | None],
    answers_b: Sequence[str | None],
    references: Sequence[str] | None,
    asking: BenchAsking,
) -> TurnChoice:
    """Choose between two models' answers to one turn, A shown first. Callers ask in both orders."""
    fields = _question_fields(turn, questions, references)
    fields |= _answers("answer_a", turn, answers_a) | _answers("answer_b", turn, answers_b)
    name = f"pair-{'math-v1' if references else 'v2'}{'-multi-turn' if turn == 2 else ''}"
    if _unanswered(turn, answers_a) or _unanswered(turn, answers_b):
        return TurnChoice(None, "skipped", False, None)
    read, status, contradictory, raw = await _ask(
        engine, prompts[name].messages(fields), asking, _CHOICE, read_bracketed_choice
    )
    return TurnChoice(None if read is None else read["choice"], status, contradictory, raw)


async def _ask(
    engine: ChatEngine,
    messages: list[Message],
    asking: BenchAsking,
    form: str,
    reader: Callable[[Completion, Reading], Read | None],
) -> tuple[dict[str, Any] | None, str, bool, str | None]:
    """The fields that were read, the parse status, whether the reply is contradictory, and its text."""
    grammar = Grammar.regex(form) if asking.grammar else None
    found = await ask_until_read(
        engine, messages, asking.sampling, asking, grammar, lambda reply: reader(reply, asking.reading)
    )
    contradictory = found.finished is not None and rules_differ(found.finished, reader)
    return found.fields, found.status, contradictory, found.raw


def _question_fields(turn: Turn, questions: Sequence[str], references: Sequence[str] | None) -> dict[str, str]:
    fields = {"question": questions[0]} if turn == 1 else {"question_1": questions[0], "question_2": questions[1]}
    if references is not None:
        fields["ref_answer_1"] = references[0]
        if turn == 2:
            fields["ref_answer_2"] = references[1]
    return fields


def _answers(name: str, turn: Turn, answers: Sequence[str | None]) -> dict[str, str]:
    if turn == 1:
        return {name: answers[0] or ""}
    return {f"{name}_1": answers[0] or "", f"{name}_2": answers[1] or ""}


def _unanswered(turn: Turn, answers: Sequence[str | None]) -> bool:
    return any(answer is None for answer in answers[:turn])
