"""The demo's own scores under a method broken on purpose: the labels must change, or the demo would hide it.

`demo_verdicts.csv` holds responses, scores and critiques of a run of configs/pocket.yaml, of the `PROMPTS` prompts with
the smallest ids. After a change of the pocket world it is written again:

    python -m tests.data.test_demo_faults RUN_FOLDER
"""

from __future__ import annotations

import csv
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.variants import decide_with_fault
from ray_pipeline.pocket.tasks import is_correct
from tests.planted import JUDGES, Planted, make_world

FILE = Path(__file__).parent / "demo_verdicts.csv"
COLUMNS = ("prompt", "response", *JUDGES, "flawed")
PROMPTS = 250

Answers = dict[str, list[Planted]]


@functools.cache
def recorded() -> Answers:
    answers: Answers = {}
    with FILE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            scores = [float(row[judge]) for judge in JUDGES]
            answers.setdefault(row["prompt"], []).append((row["response"], scores, row["flawed"] == "1"))
    return answers


def labels(
    scored: Callable[[Any], Any] = lambda scores: scores,
    critique: Callable[[Any], Any] = lambda flawed: flawed,
    fault: Any = None,
    **gate: Any,
) -> list[str]:
    """The label of each response, with the scores and critiques that a broken pipeline would have."""
    changed = {
        prompt: [(text, scored(scores), critique(flawed)) for text, scores, flawed in planted]
        for prompt, planted in recorded().items()
    }
    world = make_world(changed)
    arguments = (world.candidates, world.verdicts, world.critiques, JUDGES, GateConfig(**gate))
    found: list[str] = decide_with_fault(fault, *arguments)["label"].to_pylist()
    return found


def true(found: list[str]) -> float:
    """Share of the kept responses whose label is the truth: desirable and right by the right way, or neither."""
    asked = [(prompt, str(text)) for prompt, planted in recorded().items() for text, _, _ in planted]
    kept = [
        is_correct(prompt, text) == (label == "desirable")
        for (prompt, text), label in zip(asked, found, strict=True)
        if label in ("desirable", "undesirable")
    ]
    return sum(kept) / len(kept)


def test_every_label_occurs_and_the_method_is_right_more_often_than_a_judge() -> None:
    found = labels()
    for label in ("desirable", "undesirable", "discard", "abstain"):
        assert found.count(label) >= 0.04 * len(found), label
    assert true(found) >= 0.94


@pytest.mark.parametrize(
    ("broken", "least", "loss"),  # of the labels that change; of those kept, what is true less often
    [
        ({"use_critic": False}, 0.08, 0.02),
        ({"fault": "critic_sign"}, 0.08, 0.02),
        ({"fault": "critic_inverted"}, 0.2, 0.03),
        ({"critique": lambda flawed: True}, 0.1, None),  # keeps fewer responses that are right
        ({"scored": lambda scores: [scores[0]] * len(scores)}, 0.2, 0.05),
        ({"alpha": 0.25}, 0.02, None),
    ],
    ids=["no critic", "sign flipped", "critic inverted", "everything flagged", "one judge three times", "alpha 0.25"],
)
def test_a_broken_method_labels_the_demo_otherwise(broken: dict[str, Any], least: float, loss: float | None) -> None:
    whole, found = labels(), labels(**broken)
    changed = sum(one != other for one, other in zip(whole, found, strict=True)) / len(whole)
    desirable = f"desirable {whole.count('desirable')} -> {found.count('desirable')}"
    print(f"\nlabels changed {changed:.1%}, kept and true {true(whole):.1%} -> {true(found):.1%}, {desirable}")
    assert changed >= least
    if loss is not None:
        assert true(found) <= true(whole) - loss


def write(run: Path) -> None:
    """Record the scores and critiques of a run of the demo."""
    from ray_pipeline import read_run

    tables = read_run(str(run))
    asked = {row["prompt_id"]: row["messages"][-1]["content"] for row in tables.prompts.to_pylist()}
    kept = sorted(asked)[:PROMPTS]
    scores = {(row["candidate_id"], row["judge"]): row["score"] for row in tables.verdicts.to_pylist()}
    flawed = {row["candidate_id"]: row["flawed"] for row in tables.critiques.to_pylist()}
    drawn = tables.candidates.filter(pc.is_in(tables.candidates["prompt_id"], value_set=_array(kept)))
    with FILE.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for row in drawn.sort_by([("prompt_id", "ascending"), ("k", "ascending")]).to_pylist():
            key = row["candidate_id"]
            values = [scores[key, judge] for judge in JUDGES]
            if None in values or flawed[key] is None or not row["response"]:
                continue
            out.writerow([asked[row["prompt_id"]], row["response"], *map(int, values), int(flawed[key])])


def _array(values: list[str]) -> Any:
    import pyarrow as pa

    return pa.array(values)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
