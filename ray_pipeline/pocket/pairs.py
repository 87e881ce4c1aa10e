"""Pairs of answers with a known better one, in the format of agreement items: the pocket world's human labels."""

from __future__ import annotations

import random
from typing import Any

from ray_pipeline.pocket.responses import make_response
from ray_pipeline.pocket.tasks import make_prompts


def make_pairs(n: int, seed: int) -> list[dict[str, Any]]:
    """`n` items: a right and a wrong answer to an instruction that no shipped model was trained on, in
    random order.

    Raises ValueError if there are fewer than `n` instructions.
    """
    rng = random.Random(f"pocket pairs {seed}")
    rows = []
    for number, prompt in enumerate(make_prompts(n, seed)):
        answers = [make_response(prompt.instruction, grade, rng) for grade in ("right", "wrong")]
        label = rng.choice("AB")
        a, b = answers if label == "A" else reversed(answers)
        rows.append(
            {
                "item_id": f"pocket/{seed}/{number}",
                "question": prompt.instruction,
                "response_a": a,
                "response_b": b,
                "human_label": label,
            }
        )
    return rows
