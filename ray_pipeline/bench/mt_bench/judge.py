"""MT-Bench's judge, which grades an answer or compares two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ray_pipeline.agents.judges import SamplingSettings, ask_until_read
from ray_pipeline.agents.replies import Read
from ray_pipeline.bench.judge_prompts import BenchPrompt
from ray_pipeline.bench.mt_bench.questions import Question
from ray_pipeline.bench.mt_bench.replies import Reading, read_bracketed_choice, read_rating, rules_differ
from ray_pipeline.config.settings import Settings, Temperature
from ray_pipeline.engines.base import ChatEngine, Completion, Grammar

LOW, HIGH = 1.0, 10.0
#: Replies under `BenchAsking.grammar`.
_RATING, _CHOICE = r"Rating: \[\[(10|[1-9])\]\]", r"\[\[[ABC]\]\]"

Turn = Literal[1, 2]
Order = Literal["ab", "ba"]


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
    retry_temperature: Temperature = Field(0.7, description="temperature of a retry")
    grammar: bool = Field(False, description="force the reply's form while it is sampled")


@dataclasses.dataclass(frozen=True)
class TurnRating:
    """A judge's rating of one model's answer to one turn. `score` is None exactly if `parse_status` is not a read one.

    `contradictory`: the published rule takes a score from the reply, and the stricter one does not, because the reply
    holds two different verdicts or was cut off.
    """

    question_id: int
    category: str
    turn: Turn
    score: float | None
    parse_status: str
    contradictory: bool = False
    raw: str | None = None


@dataclasses.dataclass(frozen=True)
class TurnComparison:
    """One comparison of two models on one turn. In order "ab" model A's answer was shown first, in "ba" B's; `choice`
    names the answer by where it was shown (A first, B second, C tie), None when unread."""

    question_id: int
    category: str
    turn: Turn
    order: Order
    choice: str | None
    parse_status: str
    contradictory: bool = False
    raw: str | None = None


async def rate_turn(
    engine: ChatEngine,
    prompts: Mapping[str, BenchPrompt],
    question: Question,
    turn: Turn,
    answers: Sequence[str | None],
    asking: BenchAsking,
) -> TurnRating:
    """Grade the answer to one turn from 1 to 10; turn 2 is shown with turn 1 before it, and references where the
    question has them."""

    def rating(reply: Completion, reading: Reading) -> Read | None:
        return read_rating(reply, reading, LOW, HIGH)

    name = f"single-{'math-v1' if question.references else 'v1'}{'-multi-turn' if turn == 2 else ''}"
    found = await _ask(engine, prompts[name], question, turn, {"answer": answers}, asking, _RATING, rating)
    return TurnRating(question.question_id, question.category, turn, *found)


async def compare_turn(
    engine: ChatEngine,
    prompts: Mapping[str, BenchPrompt],
    question: Question,
    turn: Turn,
    answers_a: Sequence[str | None],
    answers_b: Sequence[str | None],
    asking: BenchAsking,
    order: Order = "ab",
) -> TurnComparison:
    """Choose between two models' answers to one turn. Callers ask in both orders."""
    first, second = (answers_a, answers_b) if order == "ab" else (answers_b, answers_a)
    name = f"pair-{'math-v1' if question.references else 'v2'}{'-multi-turn' if turn == 2 else ''}"
    shown = {"answer_a": first, "answer_b": second}
    found = await _ask(engine, prompts[name], question, turn, shown, asking, _CHOICE, read_bracketed_choice)
    return TurnComparison(question.question_id, question.category, turn, order, *found)


async def _ask(
    engine: ChatEngine,
    prompt: BenchPrompt,
    question: Question,
    turn: Turn,
    answers: Mapping[str, Sequence[str | None]],
    asking: BenchAsking,
    form: str,
    reader: Callable[[Completion, Reading], Read | None],
) -> tuple[Any, str, bool, str | None]:
    """The verdict that was read, the parse status, whether the reply is contradictory, and its text."""
    if any(answer is None for turns in answers.values() for answer in turns[:turn]):
        return None, "skipped", False, None
    texts = {"question": question.turns, **answers}
    fields = {name if turn == 1 else f"{name}_{i + 1}": texts[name][i] or "" for name in texts for i in range(turn)}
    fields |= {f"ref_answer_{i + 1}": text for i, text in enumerate((question.references or ())[:turn])}
    grammar = Grammar.regex(form) if asking.grammar else None
    found = await ask_until_read(
        engine, prompt.messages(fields), asking.sampling, asking, grammar, lambda reply: reader(reply, asking.reading)
    )
    contradictory = found.finished is not None and rules_differ(found.finished, reader)
    verdict = None if found.fields is None else next(iter(found.fields.values()))
    return verdict, found.status, contradictory, found.raw
