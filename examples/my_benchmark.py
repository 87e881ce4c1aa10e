"""A benchmark of your own: sums, checked by a program.

quorum run benchmarks --config configs/pocket_benchmarks.yaml benchmarks.own.sums.type=examples/my_benchmark.py
"""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ray_pipeline.bench.benchmark import question_row
from ray_pipeline.bench.simple import CheckedBenchmark
from ray_pipeline.extensions import register


@register("benchmark")
class Sums(CheckedBenchmark):
    below: int = Field(10, ge=2, description="both numbers are below this")

    def rows(self) -> list[dict[str, Any]]:
        sums = [(a, b) for a in range(self.below) for b in range(a, self.below)]
        return [
            question_row(f"{a}+{b}", place, [f"What is {a} + {b}?"], references=[str(a + b)])
            for place, (a, b) in enumerate(sums)
        ]

    def grade(self, question: dict[str, Any], answers: Sequence[str]) -> float:
        return float(re.findall(r"\d+", answers[0])[-1:] == question["references"])
