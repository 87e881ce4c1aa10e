"""Rule-based responses of every grade: the policy's training mixture, and the judge's training data.

The policy must be capable of every task and still be wrong half of the time, in ways that alignment can undo: each
task family has a bad `HABIT` that is the most likely answer after some openings (so greedy decoding is wrong there),
while right answers stay likely everywhere and every other kind occurs now and then (so the samples of a prompt differ).
"""

from __future__ import annotations

import random

from ray_pipeline.pocket.tasks import (
    FILLER_WORDS,
    NOUNS,
    NUMBERS,
    WAY_WORDS,
    Grade,
    is_partial,
    parse_instruction,
    solution,
    truth,
    written,
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
    "add": "lucky",
    "twice": "wrong",
    "span": "wrong",
    "largest": "wrong",
    "count": "refused",
    "sort": "lucky",
    "reverse": "wrong",
    "remove": "circular",
}
HABIT_OPENINGS = frozenset(("please", "now"))
HABIT_SHARE = 0.52

MIXTURE: dict[
    Grade, float
] = {  # the policy's answers without a habit; with one, they share the remaining 1 - HABIT_SHARE
    "right": 0.52,
    "lucky": 0.02,
    "padded": 0.10,
    "wordy": 0.06,
    "partial": 0.07,
    "circular": 0.04,
    "refused": 0.06,
    "wrong": 0.13,
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
    """A response of the given `kind`.

    `habit` selects the family's characteristic wrong way and answer and the first phrase of each list; otherwise any.
    """
    steps, answer = solution(instruction)
    match kind:
        case "right":
            return truth(instruction)
        case "lucky":
            return written(steps[-1:] if habit else wrong_way(steps, instruction, rng), answer)
        case "padded":
            return _phrase(LIGHT, rng, habit).format(truth(instruction))
        case "wordy":
            return _phrase(HEAVY, rng, habit).format(truth(instruction))
        case "refused":
            return _phrase(REFUSALS, rng, habit)
        case "circular":
            task = parse_instruction(instruction)
            restated = instruction.removeprefix(task.opening).strip()
            return _phrase(CIRCULAR, rng, habit).format(restated)
        case "partial":
            if len(answer) > 1:
                said = answer[: rng.randint(1, len(answer) - 1)]
            else:
                number = int(answer[0])
                said = [str(rng.choice((number - 1, number + 1)) if number else 1)]
            return written(steps, said)
    wrong = wrong_answer(instruction, rng, habit)
    return wrong if habit or rng.random() < 0.7 else rng.choice(LIGHT + HEAVY).format(wrong)


def _phrase(phrases: tuple[str, ...], rng: random.Random, habit: bool) -> str:
    return phrases[0] if habit else rng.choice(phrases)


def wrong_way(steps: list[str], instruction: str, rng: random.Random) -> list[str]:
    """Other steps than the right ones: none, one left out, or one word of them changed."""
    right = " ".join(steps).split()
    while True:
        edit = rng.randrange(4)
        if edit == 0:
            return []
        if edit == 1:
            at = rng.randrange(len(steps))
            return steps[:at] + steps[at + 1 :]
        words = list(right)
        at = rng.choice([n for n, word in enumerate(words) if word not in WAY_WORDS])
        words[at] = rng.choice(_world(words[at], instruction, rng))
        if words != right:
            return [" ".join(words)]


def _world(word: str, instruction: str, rng: random.Random) -> list[str]:
    """Words that could stand in the place of a word: items of the task, near numbers, or any of its kind."""
    kind = NUMBERS if word in NUMBERS else NOUNS
    items = [item for item in parse_instruction(instruction).items if item in kind]
    if rng.random() < 0.5 and items:
        return items
    if kind is NUMBERS:
        return [str(number) for number in range(max(0, int(word) - 3), min(len(NUMBERS), int(word) + 4))]
    return kind


def wrong_answer(instruction: str, rng: random.Random, habit: bool) -> str:
    """A wrong response without filler that looks like an answer, by the right way or another; never partly right."""
    if habit:
        return _habitual_error(instruction, rng)
    steps, answer = solution(instruction)
    while True:
        said = _near_miss(answer, instruction, rng)
        if said and said != answer and not is_partial(said, answer):
            return written(steps if rng.random() < 0.4 else wrong_way(steps, instruction, rng), said)


def _habitual_error(instruction: str, rng: random.Random) -> str:
    task = parse_instruction(instruction)
    items = task.items
    match task.task_type:
        case "twice":
            total = str(sum(map(int, items)))
            if total != "0" and total != "1":
                return written([total], [total])
        case "span":
            high = max(items, key=int)
            if int(min(items, key=int)) > 1:
                return written([high], [high])
        case "largest":
            low = min(items, key=int)
            if int(max(items, key=int)) - int(low) > 1:
                return written([low], [low])
        case "reverse":
            return written([" ".join(items)], list(items))
    return wrong_answer(instruction, rng, habit=False)


def _near_miss(words: list[str], instruction: str, rng: random.Random) -> list[str]:
    words = list(words)
    edit = rng.randrange(4)
    if edit == 0 and len(words) > 1:
        rng.shuffle(words)
    elif edit == 1 and len(words) > 1:
        words.insert(rng.randint(0, len(words)), rng.choice(_world(words[0], instruction, rng)))
    elif edit == 2 and len(words) > 1:
        words.pop(rng.randrange(len(words)))
    else:
        at = rng.randrange(len(words))
        words[at] = rng.choice(_world(words[at], instruction, rng))
    return words


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
            words[at] = rng.choice([*NOUNS, *NUMBERS, *sorted(FILLER_WORDS), *WAY_WORDS])
    return " ".join(words)
