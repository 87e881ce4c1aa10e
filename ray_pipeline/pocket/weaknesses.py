"""Where the judges and the critic of a panel are taught to err: each on tasks of its own.

Networks that are trained on the same truth with other seeds and other data err on the same hard responses. So each
member of the panel is also taught mistakes that follow from the task alone, by the last word of its right answer: with
some words it takes every answer for right (lenient), with others for wrong (severe). Inference stays deterministic.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ray_pipeline.pocket.tasks import NOUNS, NUMBERS, RIGHT, RUBRICS, Grade, solution

WORDS = (*NOUNS, *NUMBERS[:21])
OF_A_JUDGE = 10
"""Words of each judge, of 45; no two judges share one."""
OF_THE_CRITIC = 11
"""Words of the critic, drawn apart from the judges'."""


@dataclass(frozen=True)
class Weaknesses:
    """Last words of right answers with which one member of a panel errs."""

    lenient: frozenset[str]
    severe: frozenset[str]

    def mistaken(self, instruction: str, seen: Grade) -> Grade:
        """What the member takes a response for that is `seen` in truth. All recognise that there is no answer."""
        last = solution(instruction)[1][-1]
        if last in self.lenient and seen in ("wrong", "partial", "lucky"):
            return "right"
        if last in self.severe and seen in RIGHT:
            return "wrong"
        return seen


def weaknesses(seed: int) -> dict[str, Weaknesses]:
    """The weaknesses of each judge of `RUBRICS` and of the critic; every second word makes it lenient."""
    rng = random.Random(f"pocket weaknesses {seed}")
    judges = rng.sample(WORDS, OF_A_JUDGE * len(RUBRICS))
    shares = {name: judges[place :: len(RUBRICS)] for place, name in enumerate(RUBRICS)}
    shares["critic"] = rng.sample(WORDS, OF_THE_CRITIC)
    return {name: Weaknesses(frozenset(words[::2]), frozenset(words[1::2])) for name, words in shares.items()}
