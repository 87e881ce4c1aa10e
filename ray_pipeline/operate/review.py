"""Rows of a run that a person should look at, as a page for labelling, JSONL, and records for Argilla."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from ray_pipeline.data.early_exit import in_audit_slice
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.evaluate.excerpts import as_text
from ray_pipeline.graph.results import Run, of_role
from ray_pipeline.report.html import render_review
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.keys import unit_hash
from ray_pipeline.store.locations import make_folder, set_mode
from ray_pipeline.store.outside import visible

#: Why a row is in a review. chance: drawn by chance, so that shares over these rows hold for the run. abstained: the
#: judges disagree. threshold: the final score is near a threshold. disputed: kept although the judges differ.
Reason = Literal["chance", "abstained", "threshold", "disputed"]

#: Share of the rows that is drawn by chance.
CHANCE = 0.2

PAGE, ROWS, ARGILLA = "review.html", "rows.jsonl", "argilla.json"


def review(run: Run, gate: GateConfig, out: Path, rows: int = 100, chance: float = CHANCE) -> dict[str, int]:
    """Write `review.html`, `rows.jsonl` and `argilla.json`; equal runs give equal files.

    Args:
        gate: thresholds of the run.
        rows: how many; fewer where the run has fewer candidates with a final score.
        chance: share of them that is drawn by chance.

    Returns:
        Rows by `Reason`.

    Raises:
        StoreError: the run has no decisions.
    """
    made = of_role(run.results, "decisions")
    if not made:
        raise StoreError(f"{run.folder.location}: the gate is not done, so there is nothing to review; run it first")
    chosen = _chosen(made[0].table().scan(), gate, rows, bool(run.page.get("audit_slice")), chance)
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
    return {reason: sum(row["chosen_as"] == reason for row in found) for reason in dict.fromkeys(chosen.values())}


def _chosen(shards: Iterator[Any], gate: GateConfig, rows: int, audit_slice: bool, chance: float) -> dict[str, Reason]:
    """Candidates and why each is chosen: a share by chance, and equal parts of those in doubt, most doubtful first.

    Args:
        audit_slice: calls were skipped (`judge.early_exit`), so that only the audit slice stands for the run.
    """
    columns = ["candidate_id", "final_score", "score_variance", "label"]
    decisions = [row for shard in shards for row in shard.select(columns).to_pylist() if row["final_score"] is not None]
    by_hash = sorted(decisions, key=lambda row: (unit_hash("review", 0, row["candidate_id"]), row["candidate_id"]))

    def away(row: dict[str, Any]) -> float:
        distances = (abs(row["final_score"] - limit) for limit in (gate.desirable_at, gate.undesirable_at))
        return float(min(distances))

    doubts: dict[Reason, tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], float]]] = {
        "abstained": (lambda row: row["label"] == "abstain", lambda row: row["score_variance"]),
        "threshold": (lambda row: row["label"] != "abstain", away),
        "disputed": (lambda row: row["label"] in ("desirable", "undesirable"), lambda row: -row["score_variance"]),
    }
    # sorted() is stable, so candidates in equal doubt come in the order of their hashes.
    ranked = {reason: sorted(filter(fits, by_hash), key=doubt) for reason, (fits, doubt) in doubts.items()}
    whole = [row for row in by_hash if not audit_slice or in_audit_slice(row["candidate_id"])]
    chosen: dict[str, Reason] = {row["candidate_id"]: "chance" for row in whole[: round(rows * chance)]}
    queues: dict[Reason, Iterator[dict[str, Any]]] = {reason: iter(queue) for reason, queue in ranked.items()}
    while queues and len(chosen) < rows:
        for reason in list(queues):
            row = next((row for row in queues[reason] if row["candidate_id"] not in chosen), None)
            if row is None:
                del queues[reason]
            elif len(chosen) < rows:
                chosen[row["candidate_id"]] = reason
    return chosen


def _with_texts(run: Run, chosen: dict[str, Reason]) -> Iterator[dict[str, Any]]:
    """The rows in an order that says nothing about why they were chosen."""
    import pyarrow as pa
    import pyarrow.compute as pc

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
            "chosen_as": chosen[name],
        }


def _record(row: dict[str, Any]) -> dict[str, Any]:
    """A record in the form of Argilla's `dataset.records.from_json`; its question is `label`."""
    return {
        "id": row["candidate_id"],
        "fields": {"prompt": row["prompt"], "response": row["response"]},
        "metadata": {"prompt_id": row["prompt_id"], "chosen_as": row["chosen_as"]},
        "suggestions": {},
        "responses": {},
        "vectors": {},
    }
