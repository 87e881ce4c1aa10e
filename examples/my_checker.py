"""A checker of your own: the report shows which share of the responses it calls right.

quorum run dmapo --config FILE evaluate.checker=examples/my_checker.py
"""

import re
from collections.abc import Mapping, Sequence

from ray_pipeline.extensions import register


@register("checker")
def sums(prompt: Sequence[Mapping[str, str]], response: str) -> bool | None:
    """Of the prompts of my_source.py; None for any other."""
    asked = re.fullmatch(r"What is (\d+) \+ (\d+)\?", prompt[-1]["content"])
    if asked is None:
        return None
    return str(int(asked[1]) + int(asked[2])) in re.findall(r"\d+", response)
