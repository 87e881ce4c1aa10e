"""The pocket world: small verifiable instructions, their correct answers, and the rules of a perfect judge.

Everything here is computed from the instruction text alone, so the truth of any prompt is available at any time:

    instruction = [opening] task words          "please sort 7 2 9"
    truth       = the one right answer          "2 7 9"
    grade       = what kind of answer it is     "2 9 7" -> "wrong", "the answer is 2 7 9" -> "padded"

All scores, critiques and preferences follow from the grade by the table `SCORES`; its numbers are chosen so that the
default gate (mean of three scores; sample variance > 2.5 abstains, f >= 7 desirable, f <= 4 undesirable) gives every
label:

    right                                    desirable
    padded, partial                          discard
    wordy                                    abstain (right and helpful, but the judge of conciseness disagrees)
    hedged, circular, refused, wrong         undesirable
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Literal

Grade = Literal["right", "padded", "wordy", "partial", "hedged", "circular", "refused", "wrong"]
FailureType = Literal["circular", "unsupported", "contradictory", "unspecified", "none"]
Choice = Literal["A", "B", "C"]
Pool = Literal["open", "weights"]

_NOUNS = "cat dog sun moon tree fish bird rock lamp boat star leaf door"
_MORE = "bell coin cup hat key ring rose ship wolf bear corn"
NOUNS = [*_NOUNS.split(), *_MORE.split()]
NUMBERS = [str(n) for n in range(21)]
OPENINGS = ("", "please", "quickly", "now")

TASK_TYPES = ("repeat", "reverse", "sort", "largest", "smallest", "first", "last", "count", "add", "remove")
_LINK_WORDS = ("of", "from")

HEDGE = "or"
REFUSAL_WORDS = frozenset(("sorry", "not"))
_FILLER = "the answer is it i think well so let me see that you need must be sure can do say know help here"
FILLER_WORDS = frozenset(_FILLER.split())
LIGHT_PADDING = 4
"""A right answer with 1 to 4 filler words is padded, with more it is wordy."""

RUBRICS = ("helpfulness", "factuality", "conciseness")

SCORES: dict[Grade, tuple[int, int, int]] = {  # helpfulness, factuality, conciseness
    "right": (9, 10, 10),
    "padded": (7, 8, 5),
    "wordy": (7, 9, 2),
    "partial": (5, 6, 6),
    "hedged": (4, 3, 3),
    "circular": (2, 4, 2),
    "refused": (1, 3, 3),
    "wrong": (2, 1, 3),
}

FAILURES: dict[Grade, FailureType] = {
    "right": "none",
    "padded": "none",
    "wordy": "none",
    "partial": "unspecified",
    "hedged": "contradictory",
    "circular": "circular",
    "refused": "unspecified",
    "wrong": "unsupported",
}


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
    if task in ("repeat", "reverse"):
        words = [task, *rng.sample(NOUNS, rng.randint(2, 4))]
    elif task == "sort":
        words = [task, *rng.sample(NUMBERS, rng.randint(2, 4))]
    elif task in ("largest", "smallest"):
        words = [task, "of", *rng.sample(NUMBERS, rng.randint(3, 5))]
    elif task in ("first", "last"):
        words = [task, "of", *rng.sample(NOUNS, rng.randint(3, 5))]
    elif task == "count":
        words = [task, *rng.sample(NOUNS, rng.randint(2, 6))]
    elif task == "add":
        words = [task, *(str(rng.randint(0, 9)) for _ in range(2))]
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
    needs_numbers = words[0] in ("sort", "largest", "smallest", "add")
    known = NUMBERS if needs_numbers else NOUNS
    if len(items) < 2 or any(item not in known for item in items):
        raise ValueError(
            f"not an instruction of the pocket world: {instruction!r} "
            f"('{words[0]}' takes two or more of: {' '.join(known)})"
        )
    return Task(opening, words[0], items)


def truth(instruction: str) -> str:
    """The one right answer to an instruction, without filler."""
    task = parse_instruction(instruction)
    items = task.items
    match task.task_type:
        case "repeat":
            return " ".join(items)
        case "reverse":
            return " ".join(reversed(items))
        case "sort":
            return " ".join(sorted(items, key=int))
        case "largest":
            return max(items, key=int)
        case "smallest":
            return min(items, key=int)
        case "first":
            return items[0]
        case "last":
            return items[-1]
        case "count":
            return str(len(items))
        case "add":
            return str(sum(map(int, items)))
        case _:
            return " ".join(item for item in items[1:] if item != items[0])


# --- the rules of a perfect judge ----------------------------------------------------------------------------


def grade(instruction: str, response: str) -> Grade:
    """What kind of answer this is; the first rule that fits decides.

    1. refused: contains a word of refusal ("sorry", "not"), or no word that could be an answer.
    2. circular: contains a task word ("sort", "largest", "of" ...): it restates the task instead of doing it.
    3. hedged: offers several answers joined by "or", one of them right and one not.
    4. right / padded / wordy: the content is the truth, with 0 / 1-4 / more filler words.
    5. partial: the content is an incomplete beginning of the truth.
    6. wrong: anything else.
    Content = the words that are not filler; case and punctuation do not count.
    """
    words = re.findall(r"[^\W_]+", response.lower())
    content = [word for word in words if word not in FILLER_WORDS and word != HEDGE]
    if not content or not REFUSAL_WORDS.isdisjoint(words):
        return "refused"
    if not _TASK_WORDS.isdisjoint(words):
        return "circular"
    expected = truth(instruction).split()
    options = _split_at_hedges(words)
    hits = [option == expected for option in options]
    if any(hits):
        if not all(hits):
            return "hedged"
        padding = len(words) - len(expected)
        return "right" if padding == 0 else "padded" if padding <= LIGHT_PADDING else "wordy"
    if content == expected[: len(content)]:
        return "partial"
    return "wrong"


_TASK_WORDS = frozenset((*TASK_TYPES, *_LINK_WORDS))


def _split_at_hedges(words: list[str]) -> list[list[str]]:
    options: list[list[str]] = [[]]
    for word in words:
        if word == HEDGE:
            options.append([])
        elif word not in FILLER_WORDS:
            options[-1].append(word)
    return [option for option in options if option]


def is_correct(instruction: str, response: str) -> bool:
    """Whether the content is the truth. Padding does not make an answer wrong; it only lowers conciseness."""
    return grade(instruction, response) in ("right", "padded", "wordy")


def rubric_scores(instruction: str, response: str) -> dict[str, int]:
    """The integer score (1-10) of each rubric in `RUBRICS`."""
    return dict(zip(RUBRICS, SCORES[grade(instruction, response)], strict=True))


def critique(instruction: str, response: str) -> tuple[bool, FailureType]:
    """(flawed, failure_type); the type is "none" iff not flawed. Padding alone is not a flaw."""
    failure = FAILURES[grade(instruction, response)]
    return failure != "none", failure


def preference(instruction: str, response_a: str, response_b: str) -> Choice:
    """The response with the higher sum of rubric scores; "C" (tie) if equal, that is, for the same grade."""
    sum_a = sum(SCORES[grade(instruction, response_a)])
    sum_b = sum(SCORES[grade(instruction, response_b)])
    return "A" if sum_a > sum_b else "B" if sum_b > sum_a else "C"
