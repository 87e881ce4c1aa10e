"""Rule-based responses of every grade: the policy's training mixture, and the judge's training data.

The policy must be capable of every task and still be wrong half of the time, in ways that alignment can undo: each
task family has a bad `HABIT` that is the most likely answer after some openings (so greedy decoding is wrong there),
while right answers stay likely everywhere and every other kind occurs now and then (so the samples of a prompt differ).
"""

from __future__ import annotations

import random

from ray_pipeline.pocket.tasks import (
    FILLER_WORDS,
    HEDGE,
    NOUNS,
    NUMBERS,
    Grade,
    parse_instruction,
    truth,
)

LIGHT = ("the answer is {}", "it is {}", "i think {}", "well {}", "so it is {}", "{} i think", "i think it is {}")
HEAVY = (
    "well let me see i think the answer is {}",
    "here is the answer you need it is {}",
    "{} i think that is the answer you need",
    "so let me think i see it must be {}",
    "sure i can help you the answer is {}",
)
REFUSALS = ("sorry i can not say", "i do not know", "sorry i can not help you", "i can not do that")
CIRCULAR = ("the {}", "it is {}", "the answer is {}", "{}", "well {}")

HABIT: dict[str, Grade] = {
    "repeat": "refused",
    "reverse": "wrong",
    "sort": "circular",
    "largest": "wrong",
    "smallest": "wrong",
    "first": "wrong",
    "last": "circular",
    "count": "refused",
    "add": "refused",
    "remove": "circular",
}
HABIT_OPENINGS = frozenset(("please", "now"))
HABIT_SHARE = 0.52

MIXTURE: dict[
    Grade, float
] = {  # the policy's answers without a habit; with one, they share the remaining 1 - HABIT_SHARE
    "right": 0.46,
    "padded": 0.11,
    "wordy": 0.10,
    "partial": 0.07,
    "hedged": 0.08,
    "circular": 0.05,
    "refused": 0.06,
    "wrong": 0.07,
}


def policy_response(instruction: str, rng: random.Random) -> str:
    """One draw from the unaligned policy's mixture of answers."""
    task = parse_instruction(instruction)
    if task.opening in HABIT_OPENINGS and rng.random() < HABIT_SHARE:
        return make_response(instruction, HABIT[task.task_type], rng, habit=True)
    kind = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]
    return make_response(instruction, kind, rng, habit=rng.random() < 0.7)


def judged_response(instruction: str, rng: random.Random) -> str:
    """A response for the judge to learn from: all kinds equally often, one in eight damaged at random."""
    kind = rng.choice(list(MIXTURE))
    response = make_response(instruction, kind, rng, habit=rng.random() < 0.4)
    return damage(response, rng) if rng.random() < 0.125 else response


def make_response(instruction: str, kind: Grade, rng: random.Random, habit: bool = False) -> str:
    """A response of the given `kind`, or a wrong one where the task has none of it (`partial` of one word).

    `habit` selects the family's characteristic wrong answer and the first phrase of each list; otherwise any.
    """
    answer = truth(instruction)
    match kind:
        case "right":
            return answer
        case "padded":
            return _phrase(LIGHT, rng, habit).format(answer)
        case "wordy":
            return _phrase(HEAVY, rng, habit).format(answer)
        case "refused":
            return _phrase(REFUSALS, rng, habit)
        case "circular":
            task = parse_instruction(instruction)
            restated = instruction.removeprefix(task.opening).strip()
            return _phrase(CIRCULAR, rng, habit).format(restated)
        case "hedged":
            options = [answer, wrong_answer(instruction, rng, habit)]
            rng.shuffle(options)
            return f" {HEDGE} ".join(options)
        case "partial":
            words = answer.split()
            if len(words) > 1:
                return " ".join(words[: rng.randint(1, len(words) - 1)])
    wrong = wrong_answer(instruction, rng, habit)
    return wrong if habit or rng.random() < 0.6 else rng.choice(LIGHT + HEAVY).format(wrong)


def _phrase(phrases: tuple[str, ...], rng: random.Random, habit: bool) -> str:
    return phrases[0] if habit else rng.choice(phrases)


def wrong_answer(instruction: str, rng: random.Random, habit: bool) -> str:
    """A wrong answer without filler that looks like an answer; never the truth, nor a beginning of it."""
    answer = truth(instruction)
    if habit:
        return _habitual_error(instruction)
    while True:
        words = _near_miss(answer.split(), instruction, rng)
        if words and words != answer.split()[: len(words)]:
            return " ".join(words)


def _habitual_error(instruction: str) -> str:
    task = parse_instruction(instruction)
    items = task.items
    match task.task_type:
        case "repeat" | "last":
            return " ".join(reversed(items)) if task.task_type == "repeat" else items[0]
        case "reverse":
            return " ".join(items)
        case "sort":
            return " ".join(sorted(items, key=int, reverse=True))
        case "largest":
            return min(items, key=int)
        case "smallest":
            return max(items, key=int)
        case "first":
            return items[-1]
        case "count" | "add":
            return str(int(truth(instruction)) + 1)
        case _:
            return " ".join(items[1:])


def _near_miss(words: list[str], instruction: str, rng: random.Random) -> list[str]:
    task = parse_instruction(instruction)
    numeric = words[0] in NUMBERS
    world = NUMBERS if numeric else NOUNS
    pool = list(task.items) if rng.random() < 0.6 else world
    words = list(words)
    edit = rng.randrange(5)
    if edit == 0 and len(words) > 1:
        rng.shuffle(words)
    elif edit == 1:
        words.insert(rng.randint(0, len(words)), rng.choice(pool))
    elif edit == 2 and len(words) > 1:
        words.pop(rng.randrange(len(words)))
    elif edit == 3 and len(words) == 1 and numeric:
        words = [str(max(0, int(words[0]) + rng.choice((-2, -1, 1, 2))))]
    else:
        words[rng.randrange(len(words))] = rng.choice(pool)
    return words if all(word in world for word in words) else []


def damage(response: str, rng: random.Random) -> str:
    """Drop, double, swap or replace one word, as a sampled model sometimes does."""
    words = response.split()
    at = rng.randrange(len(words))
    match rng.randrange(4):
        case 0:
            words.pop(at)
        case 1:
            words.insert(at, words[at])
        case 2:
            other = rng.randrange(len(words))
            words[at], words[other] = words[other], words[at]
        case _:
            words[at] = rng.choice([*NOUNS, *NUMBERS, *sorted(FILLER_WORDS), HEDGE])
    return " ".join(words)
