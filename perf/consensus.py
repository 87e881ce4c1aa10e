"""What pools, calibration and a cascade of judges are worth: the tables of docs/consensus.md.

    python perf/consensus.py ../shared/data/agreement

Reads the recorded FairEval judgements in that folder (`fair_eval.jsonl.gz`, `fair_eval_debate.jsonl.gz`) and simulates
panels with known truth. No model is called.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.agents.jury import VOTES, compare_scores
from ray_pipeline.agreement.document import as_document, measure
from ray_pipeline.agreement.measure_settings import CascadeSettings, MeasureSettings
from ray_pipeline.agreement.pools_page import cascades_section, pools_section
from ray_pipeline.agreement.recorded import read_recorded
from ray_pipeline.data.early_exit import SLICE
from ray_pipeline.data.judge_votes import BETWEEN, DESIRABLE, UNDESIRABLE
from ray_pipeline.report.documents import as_json
from ray_pipeline.report.figures import number, percent
from ray_pipeline.report.markdown import markdown_table
from ray_pipeline.report.page import Cell, Table
from ray_pipeline.stats.judge_errors import GROUPS, count_votes, errors_against_truth
from ray_pipeline.stats.latent_class import MISSING, Votes
from ray_pipeline.stats.posterior import fit_posterior
from ray_pipeline.store.schemas import BALLOTS, ITEMS, to_table

#: Of the simulated judges: how far its scores follow quality, its own noise, and how far longer answers please it.
JUDGES = {
    "strong": (1.0, 1.0, 0.2),
    "good": (0.9, 1.4, 0.3),
    "fair-1": (0.7, 1.8, 0.4),
    "fair-2": (0.7, 1.8, 0.0),
    "weak-1": (0.5, 2.2, 0.6),
    "weak-2": (0.4, 2.6, 0.0),
}
#: Standard deviation of the error that all judges share on an item.
SHARED = 0.6


def simulated(items: int, labelled: int, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Items and ballots: two answers of normal quality gap, three people who each see it with noise, and six judges.

    A person votes for the better answer, or a tie where the gap seems less than 0.5; the label is the unique mode.
    Scores are whole numbers from 1 to 10.
    """
    rng = np.random.default_rng(seed)
    gap, length, shared = rng.normal(0, 1.5, items), rng.normal(0, 0.5, items), rng.normal(0, SHARED, items)
    seen = gap[:, None] + rng.normal(0, 0.8, (items, 3))
    people = np.where(seen > 0.5, 2, np.where(seen < -0.5, 0, 1))
    counts = np.stack([(people == code).sum(axis=1) for code in range(3)], axis=1)
    labels = np.where(counts.max(axis=1) >= 2, counts.argmax(axis=1), 1)
    rows = [
        {
            "item_id": f"i{n:05}", "prompt_id": f"{n:05x}", "question": f"q{n}", "response_a": "a" * 1000,
            "response_b": "b" * int(1000 * np.exp(length[n])), "model_a": None, "model_b": None, "human_votes": [],
            "human_label": VOTES[labels[n]] if n < labelled else None,
        }
        for n in range(items)
    ]  # fmt: skip
    ballots: list[dict[str, Any]] = []
    for judge, (slope, noise, longer) in JUDGES.items():
        own = slope * gap + longer * length + shared + rng.normal(0, noise, items)
        middle = rng.normal(6, 1, items)
        a, b = (np.clip(np.round(middle + side * own / 2), 1, 10) for side in (-1, 1))
        for n, code in enumerate(compare_scores(a, b).tolist()):
            ballots.append(
                {
                    "item_id": f"i{n:05}", "prompt_id": f"{n:05x}", "judge": judge, "reason": None, "raw": None,
                    "score_a": float(a[n]), "score_b": float(b[n]), "vote": VOTES[code], "strategy": "combined_10",
                    "voice": "", "order": "ab", "parse_status": "ok",
                }
            )  # fmt: skip
    return to_table(rows, ITEMS), to_table(ballots, BALLOTS)


def tables(items: pa.Table, ballots: pa.Table, cascade: CascadeSettings) -> Iterator[str]:
    """The tables of pools and cascade as Markdown, without the column of the strategy."""
    settings = MeasureSettings(cascade=cascade)
    document = as_json(as_document(measure(items, ballots, settings), settings, {}))
    for section in (pools_section(document), cascades_section(document)):
        for block in [] if section is None else section.blocks:
            if isinstance(block, Table) and not block.folded:
                yield markdown_table(block.columns[1:], [row[1:] for row in block.rows])


def main(folder: str) -> None:
    """Print all tables; `folder` has the recordings."""
    small = CascadeSettings(expensive="GPT-4o", cheap=("Gemma-2-9b", "GPT-4o-mini", "Llama-3.1-8b"))
    for name in ("fair_eval", "fair_eval_debate"):
        found = read_recorded(str(Path(folder) / f"{name}.jsonl.gz"), "text", "auto")
        # Each debate is one judge of the panel here, so it is not called a debate, which no jury takes.
        ballots = [{**row, "strategy": "recorded"} for row in found.ballots]
        show(name, tables(to_table(found.items, ITEMS), to_table(ballots, BALLOTS), small))
    cheap = CascadeSettings(expensive="strong", cheap=("fair-1", "fair-2", "weak-1"))
    for labelled in (1000, 150, 60):
        show(f"Simulated panel, {labelled} labels", tables(*simulated(1000, labelled), cheap))
    show("Shared errors", shared_errors())
    show("Skipped votes", skipped_votes())


def _voted(rng: np.random.Generator, items: int, judges: int, shared: float) -> tuple[Votes, Votes]:
    """Votes, shape (items, judges), and the truth.

    Judges see whether a candidate is desirable with normal noise, a part of its variance shared by all. They vote for
    the class between where what they see is within 0.2, and are else right in four of five cases.
    """
    truth = rng.choice(np.array([UNDESIRABLE, DESIRABLE], np.int8), items)
    noise = np.sqrt(shared) * rng.normal(size=(items, 1)) + np.sqrt(1 - shared) * rng.normal(size=(items, judges))
    seen = np.where(truth == DESIRABLE, 0.84, -0.84)[:, None] + noise
    return np.select([seen > 0.2, seen < -0.2], [DESIRABLE, UNDESIRABLE], BETWEEN).astype(np.int8), truth


def skipped_votes() -> Iterator[str]:
    """What the posterior loses where three of six judges vote only on items that the others leave open at 0.9, and on a
    slice of 5 % (`judge.escalate`)."""
    rows: list[list[str | Cell]] = []
    for shared in (0.0, 0.3, 0.5):
        rng = np.random.default_rng(0)
        votes, truth = _voted(rng, 20_000, 6, shared)
        names, groups, sliced = list("abcdef"), np.arange(len(votes)) // 4 % GROUPS, rng.random(len(votes)) < SLICE
        unknown = np.full(len(votes), MISSING, np.int8)
        early = votes[:, :3]
        first = fit_posterior(names[:3], count_votes(early, unknown, groups), 3, one_coin=True)
        going = sliced | (first.posterior(early).max(axis=1) < 0.9)
        partly = np.where(going[:, None] | (np.arange(6) < 3), votes, MISSING).astype(np.int8)
        counts = [count_votes(some, unknown, groups) for some in (votes, partly)]
        whole = count_votes(partly[sliced], unknown[sliced], groups[sliced])
        every, selected = (fit_posterior(names, count, 3, one_coin=True) for count in counts)
        found = fit_posterior(names, counts[1], 3, one_coin=True, whole=whole)
        row: list[str | Cell] = [f"{shared:g}", percent(going.mean())]
        row += [number(model.model.errors[3:, 0, 0].mean()) for model in (every, found)]
        row += [number(model.errors.correlation.mean) for model in (every, found, selected)]
        for model, given in ((every, votes), (found, partly)):
            posterior = model.posterior(given)
            kept = posterior.max(axis=1) >= 0.9
            row += [percent(kept.mean()), percent((posterior.argmax(axis=1) == truth)[kept].mean())]
        rows.append(row)
    columns = [
        "shared part",
        "all judges asked",
        "accuracy of later judges, all votes",
        "skipped",
        "correlation, all votes",
    ]
    columns += ["skipped: slice", "skipped: where two voted", "labels at 0.9, all votes", "right", "skipped", "right"]
    yield markdown_table(columns, rows)


def shared_errors() -> Iterator[str]:
    """What the correction of the posterior (`gate.pool: one_coin`) is worth where judges share errors."""
    rows: list[list[str | Cell]] = []
    for judges, shared in itertools.product((3, 6, 10), (0.0, 0.3, 0.5)):
        votes, truth = _voted(np.random.default_rng(0), 4000, judges, shared)
        names = [str(n) for n in range(judges)]
        counts = count_votes(votes, truth, np.arange(4000) // 4 % GROUPS)
        found, true = fit_posterior(names, counts, 3, one_coin=True), errors_against_truth(names, counts)
        assert true is not None
        corrected, plain = found.posterior(votes), found.model.posterior(votes)
        rows.append(
            [
                f"{judges}, {shared:g}",
                number(true.correlation.mean),
                number(found.errors.correlation.mean),
                number(true.effective.mean, 1),
                number(found.effective, 1),
                percent((corrected.argmax(axis=1) == truth).mean()),
                percent(plain.max(axis=1).mean()),
                percent(corrected.max(axis=1).mean()),
            ]
        )
    columns = ["judges, shared part", "correlation of errors", "estimated", "effective judges", "as estimated"]
    yield markdown_table([*columns, "right", "mean probability, uncorrected", "corrected"], rows)


def show(title: str, found: Iterator[str]) -> None:
    print(f"### {title}", *found, sep="\n\n", end="\n\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python perf/consensus.py FOLDER, which has the recordings fair_eval.jsonl.gz")
    main(sys.argv[1])
