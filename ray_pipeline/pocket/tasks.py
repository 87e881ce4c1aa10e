"""The pocket world: small verifiable instructions, the right way to their answers, and the rules of a perfect judge.

Everything here is computed from the instruction text alone, so the truth of any prompt is available at any time:

    instruction = [opening] task words             "please sort 7 2 9"
    truth       = the way, "gives", the answer     "7 then 2 7 then 2 7 9 gives 2 7 9"
    grade       = what kind of response it is      "2 7 9 gives 2 7 9" -> "lucky", "2 9 7" -> "wrong"

Judges look at the answer, the critic also at the way: a right answer by a wrong way is as good as any to a judge, and
flawed to the critic. So scores follow from `appearance`, the grade without the way, by the table `SCORES`, critiques
from `grade`. The numbers are chosen so that the default gate (mean of three scores, times 0.85 if flawed; sample
variance > 2.5 abstains, f >= 7 desirable, f <= 4 undesirable) gives every label, with and without the critic:

                                  mean   flawed   label (without a critic)
    right                         8.0             desirable
    lucky                         8.0    6.8      discard (desirable)
    padded                        7.0             desirable
    wordy                         6.7             abstain (right and helpful, but the judge of conciseness disagrees)
    partial                       4.3    3.7      undesirable (discard)
    circular                      4.7    4.0      undesirable (discard)
    refused, wrong                1.9    1.6      undesirable

A long task (four items or more) answered in full counts one point more for helpfulness: then a lucky answer is
desirable by 0.08 (8.33, flawed 7.08).
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from dataclasses import dataclass
from typing import Literal

Grade = Literal["right", "lucky", "padded", "wordy", "partial", "circular", "refused", "wrong"]
FailureType = Literal["circular", "unsupported", "contradictory", "unspecified", "none"]
Choice = Literal["A", "B", "C"]
Pool = Literal["open", "weights"]

_NOUNS = "cat dog sun moon tree fish bird rock lamp boat star leaf door"
_MORE = "bell coin cup hat key ring rose ship wolf bear corn"
NOUNS = [*_NOUNS.split(), *_MORE.split()]
NUMBERS = [str(n) for n in range(40)]
OPENINGS = ("", "please", "quickly", "now")

TASK_TYPES = ("add", "twice", "span", "largest", "count", "sort", "reverse", "remove")
_OF_NUMBERS = ("add", "twice", "span", "largest", "sort")
_LINK_WORDS = ("of", "from")

STEP = "then"
GIVES = "gives"
"""Between the way and the answer."""
KEEP, DROP = "keep", "drop"
WAY_WORDS = (STEP, GIVES, KEEP, DROP)

REFUSAL_WORDS = frozenset(("sorry", "not"))
_FILLER = "the answer is it i think well so let me see that you need must be sure can do say know help here"
FILLER_WORDS = frozenset(_FILLER.split())
LIGHT_PADDING = 4
"""A right answer with 1 to 4 filler words is padded, with more it is wordy."""
LONG_TASK = 4
"""Items from which a full answer is worth one point more of helpfulness."""

RUBRICS = ("helpfulness", "factuality", "conciseness")

SCORES: dict[Grade, tuple[int, int, int]] = {  # by appearance: helpfulness, factuality, conciseness
    "right": (8, 9, 7),
    "padded": (7, 7, 7),
    "wordy": (8, 9, 3),
    "partial": (4, 6, 3),
    "circular": (6, 4, 4),
    "refused": (1, 3, 1),
    "wrong": (2, 1, 3),
}

FAILURES: dict[Grade, FailureType] = {
    "right": "none",
    "padded": "none",
    "wordy": "none",
    "lucky": "unsupported",
    "partial": "contradictory",
    "circular": "circular",
    "refused": "unspecified",
    "wrong": "unsupported",
}

RIGHT: tuple[Grade, ...] = ("right", "padded", "wordy")
"""Grades of a right answer, by a right way or in appearance."""


@dataclass(frozen=True)
class PocketPrompt:
    """One instruction of the pocket world and its family (one of `TASK_TYPES`)."""

    instruction: str
    task_type: str


# --- prompts -------------------------------------------------------------------------------------------------


def make_prompts(n: int, seed: int, pool: Pool = "open") -> list[PocketPrompt]:
    """`n` distinct instructions, the same for the same arguments on every machine; families are equally likely until
    one runs out (the open pool has about 100 sums, and tens of thousands of prompts in all).

    `pool="open"` (the default) draws only from prompts that the shipped weights never saw in training;
    `pool="weights"` draws from the other three quarters of the world, and is what make_models trains on.
    """
    rng = random.Random(f"pocket prompts {pool} {seed}")
    prompts: dict[str, PocketPrompt] = {}
    attempts = 0
    while len(prompts) < n:
        prompt = random_prompt(rng)
        attempts += 1
        if attempts > 1000 + 100 * n:
            raise ValueError(
                f"the pocket world has no more than about {len(prompts)} distinct prompts here; request fewer than {n}"
            )
        if pool_of(prompt.instruction) == pool:
            prompts.setdefault(prompt.instruction, prompt)
    return list(prompts.values())


def pool_of(instruction: str) -> Pool:
    """The side of the fixed split that an instruction is on: a quarter of the world, by hash, is never trained on."""
    digest = hashlib.sha256(instruction.encode()).digest()
    return "open" if digest[0] < 64 else "weights"


def random_prompt(rng: random.Random) -> PocketPrompt:
    """One random instruction, every family equally likely."""
    task = rng.choice(TASK_TYPES)
    digits = NUMBERS[:10]
    if task == "add":
        words = [task, *rng.choices(digits, k=rng.randint(2, 4))]
    elif task == "twice":
        words = [task, *rng.choices(digits, k=2)]
    elif task == "span":
        words = [task, "of", *rng.sample(NUMBERS[:16], rng.randint(3, 5))]
    elif task == "largest":
        words = [task, "of", *rng.sample(NUMBERS[:21], rng.randint(3, 5))]
    elif task == "sort":
        words = [task, *rng.sample(NUMBERS[:21], rng.randint(2, 4))]
    elif task == "reverse":
        words = [task, *rng.sample(NOUNS, rng.randint(2, 4))]
    elif task == "count":
        words = [task, *rng.sample(NOUNS, rng.randint(2, 6))]
    else:
        items = rng.sample(NOUNS, rng.randint(3, 4))
        words = [task, rng.choice(items), "from", *items]
    opening = rng.choice(OPENINGS)
    return PocketPrompt(" ".join([opening, *words] if opening else words), task)


# --- truth ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A parsed instruction: opening word ("" if none), family, items (for `remove`, items[0] is what must go)."""

    opening: str
    task_type: str
    items: tuple[str, ...]


def parse_instruction(instruction: str) -> Task:
    """Parse an instruction of the pocket world. Raises ValueError for any other text."""
    words = instruction.split()
    opening = words.pop(0) if words and words[0] in OPENINGS else ""
    if len(words) < 3 or words[0] not in TASK_TYPES:
        raise ValueError(f"not an instruction of the pocket world: {instruction!r} (expected e.g. 'please sort 7 2 9')")
    items = tuple(word for word in words[1:] if word not in _LINK_WORDS)
    known = NUMBERS if words[0] in _OF_NUMBERS else NOUNS
    if len(items) < 2 or any(item not in known for item in items):
        raise ValueError(
            f"not an instruction of the pocket world: {instruction!r} "
            f"('{words[0]}' takes two or more of: {' '.join(known)})"
        )
    return Task(opening, words[0], items)


def solution(instruction: str) -> tuple[list[str], list[str]]:
    """The steps of the right way, each as one text, and the words of the one right answer."""
    task = parse_instruction(instruction)
    items = task.items
    match task.task_type:
        case "add":
            totals = [str(total) for total in itertools.accumulate(map(int, items))]
            return totals, totals[-1:]
        case "twice":
            total = sum(map(int, items))
            return [f"{total} {STEP}", str(2 * total)], [str(2 * total)]
        case "span":
            high, low = max(map(int, items)), min(map(int, items))
            return [f"{high} {STEP}", str(low)], [str(high - low)]
        case "largest":
            best = [str(number) for number in itertools.accumulate(map(int, items), max)]
            return best, best[-1:]
        case "count":
            return [f"{item} {n}" for n, item in enumerate(items, 1)], [str(len(items))]
        case "sort":
            return _passes([sorted(items[:n], key=int) for n in range(1, len(items) + 1)])
        case "reverse":
            return _passes([list(reversed(items[:n])) for n in range(1, len(items) + 1)])
        case _:
            away, *rest = items
            steps = [f"{DROP if item == away else KEEP} {item}" for item in rest]
            return steps, [item for item in rest if item != away]


def _passes(lists: list[list[str]]) -> tuple[list[str], list[str]]:
    *early, last = [" ".join(words) for words in lists]
    return [*(f"{words} {STEP}" for words in early), last], lists[-1]


def truth(instruction: str) -> str:
    """The one right response to an instruction, way and answer, without filler."""
    steps, answer = solution(instruction)
    return written(steps, answer)


def written(steps: list[str], answer: list[str]) -> str:
    """A response of these steps and this answer; without steps the answer alone."""
    return " ".join([*steps, GIVES, *answer] if steps else answer)


# --- the rules of a perfect judge ----------------------------------------------------------------------------


def appearance(instruction: str, response: str) -> Grade:
    """What kind of response this is to a judge, who looks at the answer; the first rule that fits decides.

    1. refused: contains a word of refusal ("sorry", "not"), or no word that could be an answer.
    2. circular: contains a task word ("sort", "largest", "of" ...): it restates the task instead of doing it.
    3. right / padded / wordy: the answer is the right one, with 0 / 1-4 / more filler words in the response.
    4. partial: the answer is an incomplete beginning of the right one, or a number next to it.
    5. wrong: anything else.
    Answer = what follows the last "gives" (without one: all), without filler. Case and punctuation do not count.
    """
    words, way, said = _parts(response)
    if not (way or said) or not REFUSAL_WORDS.isdisjoint(words):
        return "refused"
    if not _TASK_WORDS.isdisjoint(words):
        return "circular"
    _, expected = solution(instruction)
    if said == expected:
        padding = sum(word in FILLER_WORDS for word in words)
        return "right" if padding == 0 else "padded" if padding <= LIGHT_PADDING else "wordy"
    return "partial" if is_partial(said, expected) else "wrong"


_TASK_WORDS = frozenset((*TASK_TYPES, *_LINK_WORDS))


def _parts(response: str) -> tuple[list[str], list[str], list[str]]:
    """All words of a response, and those of its way and of its answer without filler."""
    words = re.findall(r"[^\W_]+", response.lower())
    content = [word for word in words if word not in FILLER_WORDS]
    if GIVES not in content:
        return words, [], content
    at = len(content) - 1 - content[::-1].index(GIVES)
    return words, content[:at], content[at + 1 :]


def is_partial(said: list[str], expected: list[str]) -> bool:
    """Whether an answer is an incomplete beginning of the expected one, or the number before or after it."""
    if len(said) == len(expected) == 1 and said[0] in NUMBERS and expected[0] in NUMBERS:
        return abs(int(said[0]) - int(expected[0])) == 1
    return 0 < len(said) < len(expected) and said == expected[: len(said)]


def grade(instruction: str, response: str) -> Grade:
    """What kind of response this is: its appearance, and lucky if the right answer was not found by the right way."""
    seen = appearance(instruction, response)
    if seen not in RIGHT:
        return seen
    steps, _ = solution(instruction)
    return seen if _parts(response)[1] == " ".join(steps).split() else "lucky"


def is_correct(instruction: str, response: str) -> bool:
    """Whether the answer is right by the right way. Padding does not make it wrong; a judge of conciseness objects."""
    return grade(instruction, response) in RIGHT


def scores_of(instruction: str, seen: Grade) -> dict[str, int]:
    """The integer score (1-10) of each rubric in `RUBRICS` for a response that a judge takes for `seen`."""
    scores = dict(zip(RUBRICS, SCORES[seen], strict=True))
    if seen == "right" and len(parse_instruction(instruction).items) >= LONG_TASK:
        scores["helpfulness"] += 1
    return scores


def rubric_scores(instruction: str, response: str) -> dict[str, int]:
    """The integer score (1-10) of each rubric in `RUBRICS`."""
    return scores_of(instruction, appearance(instruction, response))


def critique(instruction: str, response: str) -> tuple[bool, FailureType]:
    """(flawed, failure_type); the type is "none" iff not flawed. Padding alone is not a flaw."""
    failure = FAILURES[grade(instruction, response)]
    return failure != "none", failure


def preference(instruction: str, response_a: str, response_b: str) -> Choice:
    """The response with the higher sum of rubric scores; "C" (tie) if equal, as for the same appearance."""
    sum_a, sum_b = (sum(rubric_scores(instruction, response).values()) for response in (response_a, response_b))
    return "A" if sum_a > sum_b else "B" if sum_b > sum_a else "C"
