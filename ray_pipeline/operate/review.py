"""Rows of a run that a person should look at, as a page for labelling, JSONL, and records for Argilla."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.data.early_exit import slice_of
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.rows import one_array
from ray_pipeline.evaluate.excerpts import as_text
from ray_pipeline.evaluate.people import predicted_desirable
from ray_pipeline.graph.results import Run, of_final_round, of_role
from ray_pipeline.report.html import render_review
from ray_pipeline.stats.label_value import deviation, draw, worth
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.keys import unit_hash
from ray_pipeline.store.locations import make_folder, set_mode
from ray_pipeline.store.outside import visible

#: How a row was drawn: with the same probability as every other (chance), so that shares over these rows hold for the
#: run, or with a probability that goes with what its label is expected to tell (value).
Reason = Literal["chance", "value"]

#: Share of the rows that is drawn evenly, by chance.
CHANCE = 0.2

PAGE, ROWS, ARGILLA = "review.html", "rows.jsonl", "argilla.json"


def review(run: Run, gate: GateConfig, out: Path, rows: int = 100, chance: float = CHANCE) -> dict[str, int]:
    """Write `review.html`, `rows.jsonl` and `argilla.json`; equal runs give equal files.

    Args:
        gate: thresholds of the run.
        rows: how many; fewer where the run has fewer candidates with a final score.
        chance: share of them that is drawn evenly.

    Returns:
        Rows by `Reason`.

    Raises:
        StoreError: the run has no decisions.
    """
    made = of_role(of_final_round(run.results), "decisions")
    if not made:
        raise StoreError(f"{run.folder.location}: the gate is not done, so there is nothing to review; run it first")
    chosen = choose(_to_draw_from(run, made[0].table().scan()), gate, rows, chance)
    found = list(_with_texts(run, chosen))
    name = f"labels-{run.name}.jsonl"
    about = {"key": f"quorum review {made[0].fingerprint}", "file": name}
    texts = {
        PAGE: render_review(f"Review of {run.name}", about, found),
        ROWS: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found),
        ARGILLA: json.dumps([_record(row) for row in found], ensure_ascii=False, indent=1) + "\n",
    }
    make_folder(str(out))
    for file, text in texts.items():
        (out / file).write_text(text, encoding="utf-8", newline="\n")
        set_mode(str(out / file))
    return dict(collections.Counter(reason for reason, _ in chosen.values()))


def choose(decisions: pa.Table, gate: GateConfig, rows: int, chance: float = CHANCE) -> dict[str, tuple[Reason, float]]:
    """Candidates to label and the probability of each: a share drawn evenly, the others by the value of their labels.

    The value of a label is what it is expected to add to the two shares of the report: of the candidates that people
    call desirable, and of the kept labels that they agree with (`evaluate.people.powered_shares`).

    Args:
        decisions: columns candidate_id, final_score, score_variance and label are read; a final score in every row.
    """
    names = decisions["candidate_id"].to_pylist()
    desirable = predicted_desirable(decisions, gate)
    doubt = deviation(np.stack([1 - desirable, desirable], axis=1), (0, 1))
    kept = np.asarray(pc.is_in(one_array(decisions["label"]), value_set=pa.array(["desirable", "undesirable"])))
    first, second = (np.array([unit_hash(kind, 0, name) for name in names]) for kind in ("review", "review value"))
    drawn = draw(worth([doubt, np.where(kept, doubt, 0.0)]), rows, chance, first, second)
    return {
        names[item]: ("chance" if place < drawn.even else "value", float(drawn.probability[item]))
        for place, item in enumerate(drawn.items.tolist())
    }


def _to_draw_from(run: Run, shards: Iterator[pa.Table]) -> pa.Table:
    """Candidates with a final score; where calls were skipped (`judge.early_exit`), those of the audit slice alone,
    which stand for the run."""
    columns = ["candidate_id", "prompt_id", "final_score", "score_variance", "label"]
    found = pa.concat_tables([shard.select(columns).filter(pc.is_valid(shard["final_score"])) for shard in shards])
    if run.page.get("audit_slice"):
        found = found.filter(slice_of(found, run.page.get("slice_by", "candidate_id")))
    return found


def _with_texts(run: Run, chosen: dict[str, tuple[Reason, float]]) -> Iterator[dict[str, Any]]:
    """The rows in an order that says nothing about why they were chosen."""

    def rows_of(column: str, names: list[str], *roles: str) -> list[dict[str, Any]]:
        """Rows of the tables of these roles, one shard in memory at a time."""
        wanted = pa.array(names, pa.string())
        tables = [result.table() for result in of_role(run.results, *roles)]
        shards = (shard for table in tables for shard in table.scan())
        return [row for shard in shards for row in shard.filter(pc.is_in(shard[column], value_set=wanted)).to_pylist()]

    names = sorted(chosen, key=lambda name: (unit_hash("review order", 0, name), name))
    candidates = {row["candidate_id"]: row for row in rows_of("candidate_id", names, "candidates")}
    decisions = {row["candidate_id"]: row for row in rows_of("candidate_id", names, "decisions")}
    critiques = {row["candidate_id"]: row for row in rows_of("candidate_id", names, "critiques")}
    prompt_ids = sorted({row["prompt_id"] for row in candidates.values()})
    prompts = {row["prompt_id"]: as_text(row["messages"]) for row in rows_of("prompt_id", prompt_ids, "prompts")}
    verdicts: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of("candidate_id", names, "verdicts"):
        verdicts.setdefault(row["candidate_id"], []).append(row)
    for name in names:
        candidate, decision, critique = candidates[name], decisions[name], critiques.get(name, {})
        yield {
            "candidate_id": name,
            "prompt_id": candidate["prompt_id"],
            "prompt": visible(prompts.get(candidate["prompt_id"], "")),
            "response": visible(candidate["response"] or ""),
            "label": decision["label"],
            "why": visible(decision["why"]),
            "final_score": decision["final_score"],
            "judges": [
                {"judge": row["judge"], "score": row["score"], "reason": visible(row["reason"] or "")}
                for row in sorted(verdicts.get(name, []), key=lambda row: str(row["judge"]))
            ],
            "critique": visible(critique.get("reason") or "") or None,
            "chosen_as": chosen[name][0],
            "probability": chosen[name][1],
        }


def _record(row: dict[str, Any]) -> dict[str, Any]:
    """A record in the form of Argilla's `dataset.records.from_json`; its question is `label`."""
    return {
        "id": row["candidate_id"],
        "fields": {"prompt": row["prompt"], "response": row["response"]},
        "metadata": {name: row[name] for name in ("prompt_id", "chosen_as", "probability")},
        "suggestions": {},
        "responses": {},
        "vectors": {},
    }
