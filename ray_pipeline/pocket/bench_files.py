"""Question files of the pocket world in the formats of the public benchmarks, so that all three run without a download.

They contain none of the benchmarks' own questions. The references are the correct answers; IFEval's instructions are
checked by the official checkers: the answer has the right words, few others, and no comma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray_pipeline.pocket.tasks import make_prompts, truth

#: MT-Bench's categories; each has one question.
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
INSTRUCTIONS, PROMPTS = 12, 12
_PREFIX = "pocket:"


def _turns() -> list[tuple[int, str, list[str]]]:
    asked = [p.instruction for p in make_prompts(2 * len(CATEGORIES), seed=101)]
    return [(n + 1, category, asked[2 * n : 2 * n + 2]) for n, category in enumerate(CATEGORIES)]


def _mt_bench() -> list[dict[str, Any]]:
    return [{"question_id": n, "category": category, "turns": turns} for n, category, turns in _turns()]


def _mt_bench_references() -> list[dict[str, Any]]:
    return [{"question_id": n, "choices": [{"turns": [truth(t) for t in turns]}]} for n, _, turns in _turns()]


def _alpaca_eval() -> list[dict[str, Any]]:
    asked = [p.instruction for p in make_prompts(INSTRUCTIONS, seed=102)]
    return [{"instruction": text, "output": truth(text), "dataset": "pocket"} for text in asked]


def _ifeval() -> list[dict[str, Any]]:
    rows = []
    for key, prompt in enumerate(make_prompts(PROMPTS, seed=103), 1):
        words = truth(prompt.instruction).split()
        rows.append(
            {
                "key": key,
                "prompt": prompt.instruction,
                "instruction_id_list": [
                    "keywords:existence",
                    "length_constraints:number_words",
                    "punctuation:no_comma",
                ],
                "kwargs": [{"keywords": words}, {"relation": "less than", "num_words": len(words) + 2}, {}],
            }
        )
    return rows


_FILES: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
    "mt_bench": _mt_bench,
    "mt_bench_references": _mt_bench_references,
    "alpaca_eval": _alpaca_eval,
    "ifeval": _ifeval,
}


def is_pocket(source: str) -> bool:
    """Whether a source refers to a file of the pocket world."""
    return source.startswith(_PREFIX)


def pocket_rows(source: str) -> list[dict[str, Any]]:
    """Rows of `pocket:mt_bench`, `pocket:mt_bench_references`, `pocket:alpaca_eval` or `pocket:ifeval`.

    Raises:
        ValueError: any other name.
    """
    name = source.removeprefix(_PREFIX)
    if name not in _FILES:
        raise ValueError(f"unknown pocket questions {source!r}; choose from {', '.join(_PREFIX + f for f in _FILES)}")
    return _FILES[name]()
