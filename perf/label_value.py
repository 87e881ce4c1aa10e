"""Labels that `quorum review` saves by drawing rows by the value of their labels: the table of docs/consensus.md.

    python perf/label_value.py ../shared/data/agreement

Draws are repeated on a simulated run (scores through the gate, rows drawn and shares estimated by the functions of
`quorum review` and the report), on a simulated panel, and on the recorded FairEval judgements in that folder
(`fair_eval.jsonl.gz`, `fair_eval_debate.jsonl.gz`), whose labels are all known. No model is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from consensus import simulated

from ray_pipeline.agreement.panel import Panel, make_panel
from ray_pipeline.agreement.pools import unsupervised
from ray_pipeline.agreement.recorded import read_recorded
from ray_pipeline.data.gate import GateConfig, label_cases
from ray_pipeline.data.reviewed import Reviewed
from ray_pipeline.evaluate.people import powered_shares
from ray_pipeline.operate.review import CHANCE, choose
from ray_pipeline.report.figures import number, percent
from ray_pipeline.report.markdown import markdown_table
from ray_pipeline.stats.label_value import deviation, draw, worth
from ray_pipeline.stats.prediction_powered import Powered, powered_mean
from ray_pipeline.store.schemas import ITEMS, to_table

ROUNDS = 200
WIN = np.linspace(0, 1, 3)

#: From a number of labels, the share that is drawn evenly, and a round: estimates by quantity.
Estimates = Callable[[int, float, int], dict[str, Powered]]


def simulated_run(candidates: int = 2000) -> tuple[dict[str, float], Estimates]:
    """Four candidates a prompt, three judges of different accuracy who share a part of their errors, a critic that is
    right in 85 %, and a person who sees the quality with noise; and the true shares."""
    rng = np.random.default_rng(0)
    gate = GateConfig()
    quality = np.repeat(rng.normal(0, 0.7, candidates // 4), 4) + rng.normal(0, 1.2, candidates)
    shared = rng.normal(0, 0.9, candidates)
    scores = np.stack(
        [np.clip(np.round(6 + 1.8 * (quality + shared) + rng.normal(0, noise, candidates)), 1, 10)
         for noise in (0.8, 1.2, 1.6)], axis=1
    )  # fmt: skip
    liked = quality + rng.normal(0, 0.8, candidates) > 0
    flawed = np.where(rng.random(candidates) < 0.85, ~liked, liked).astype(float)
    found = label_cases(scores, flawed, np.zeros(candidates, dtype=bool), gate)
    labels = found.labels.to_pylist()
    people = np.where(liked, "desirable", "undesirable").tolist()
    kept = np.array([label in ("desirable", "undesirable") for label in labels])
    agree = np.array([one == other for one, other in zip(labels, people, strict=True)])

    def estimates(rows: int, even: float, turn: int) -> dict[str, Powered]:
        names = [f"{turn} {n}" for n in range(candidates)]
        decisions = pa.table(
            {
                "candidate_id": names, "prompt_id": [f"p{n // 4}" for n in range(candidates)],
                "score_variance": found.variance, "final_score": found.final, "label": labels, "why": labels,
            }
        )  # fmt: skip
        chosen = choose(decisions, gate, rows, even)
        said = {name: people[int(name.split()[1])] for name in chosen}
        return powered_shares(decisions, Reviewed(said, probabilities={n: p for n, (_, p) in chosen.items()}), gate)

    names = ("candidates that people call desirable", "kept labels that people agree with")
    return dict(zip(names, (float(liked.mean()), float(agree[kept].mean())), strict=True)), estimates


def of_panel(panel: Panel) -> tuple[dict[str, float], Estimates]:
    """Win rate of answer B and agreement with the panel, predicted by the one-coin model of its votes."""
    pool = unsupervised(panel.evaluators)["one-coin"]
    assert pool.probabilities is not None
    p, questions = pool.probabilities, np.asarray(panel.questions)
    right = np.eye(3)[pool.votes]
    values = {
        "win rate of answer B": (WIN[panel.labels], p @ WIN, deviation(p, WIN)),
        "agreement with the panel": (
            (pool.votes == panel.labels).astype(float), (p * right).sum(axis=1), deviation(p, right)
        ),
    }  # fmt: skip
    sizes = worth([size for _, _, size in values.values()])

    def estimates(rows: int, even: float, turn: int) -> dict[str, Powered]:
        rng = np.random.default_rng(turn)
        drawn = draw(sizes, rows, even, rng.random(len(p)), rng.random(len(p)))
        own, rest = drawn.items, np.setdiff1d(np.arange(len(p)), drawn.items)
        found = {}
        for name, (y, f, _) in values.items():
            estimate = powered_mean(
                y[own], f[own], f[rest], questions[own], questions[rest], probabilities=drawn.probability[own]
            )
            assert estimate is not None
            found[name] = estimate
        return found

    return {name: float(y.mean()) for name, (y, _, _) in values.items()}, estimates


def lines(name: str, truth: dict[str, float], estimates: Estimates, labels: int) -> Iterator[list[Any]]:
    """One row a quantity: mean squared widths of the intervals become numbers of labels."""
    found = {even: [estimates(labels, even, turn) for turn in range(ROUNDS)] for even in (1.0, CHANCE)}

    def square(of: list[Any]) -> float:
        return float(np.mean([(one.high - one.low) ** 2 for one in of]))

    for quantity, true in truth.items():
        alone = square([one[quantity].alone for one in found[1.0]])
        evenly, value = ([one[quantity].powered for one in found[even]] for even in (1.0, CHANCE))
        covered = [percent(float(np.mean([one.low <= true <= one.high for one in of]))) for of in (evenly, value)]
        yield [
            name, quantity, number(labels), number(alone**0.5, 3), number(square(evenly) ** 0.5, 3),
            number(square(value) ** 0.5, 3), percent(1 - square(evenly) / alone), percent(1 - square(value) / alone),
            *covered,
        ]  # fmt: skip


def main(folder: str) -> None:
    """Print the table; `folder` has the recordings."""
    rows = []
    truth, estimates = simulated_run()
    for labels in (100, 300):
        rows += lines("simulated run, 2,000 candidates", truth, estimates, labels)
    rows += lines("simulated panel, 1,000 items", *of_panel(make_panel(*simulated(1000, 1000))), 100)
    for name in ("fair_eval", "fair_eval_debate"):
        recorded = read_recorded(str(Path(folder) / f"{name}.jsonl.gz"), "text", "auto")
        panel = make_panel(to_table(recorded.items, ITEMS), pa.Table.from_pylist(recorded.ballots))
        rows += lines(f"{name}, 80 items", *of_panel(panel), 40)
    columns = ["data", "mean of people's labels", "labels", "width, labels alone", "with predictions"]
    columns += ["drawn by value", "labels saved by predictions", "with value", "covered, evenly", "covered, by value"]
    print(markdown_table(columns, rows))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python perf/label_value.py FOLDER, which has the recordings fair_eval.jsonl.gz")
    main(sys.argv[1])
