"""The agreement workflow as a user types it: recorded judgements, and a pocket judge asked live."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.pocket.responses import make_response
from ray_pipeline.pocket.tasks import make_prompts
from tests.dags.conftest import engine_calls, manifest, run

pytestmark = pytest.mark.e2e

CONFIG = "configs/agreement.yaml"


def pocket_items(path: Path, count: int) -> str:
    """Pairs of a right and a wrong answer in both places, labelled by the truth, with two recorded judges."""
    rng = random.Random(0)
    rows = []
    for n, prompt in enumerate(make_prompts(count, seed=7)):
        right, wrong = make_response(prompt.instruction, "right", rng), make_response(prompt.instruction, "wrong", rng)
        a, b, label = (right, wrong, "A") if n % 2 else (wrong, right, "B")
        scores = (9, 2) if label == "A" else (2, 9)
        rows.append(
            {
                "item_id": f"pocket/{n}", "question": prompt.instruction, "response_a": a, "response_b": b,
                "human_label": label,
                "combined_10": {
                    "always right": {"text": f"Score A: {scores[0]}/10\nScore B: {scores[1]}/10"},
                    "always first": {"text": "Score A: 9/10\nScore B: 2/10"},
                },
            }
        )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def judged(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    document = json.loads((folder / "report" / "agreement.json").read_text())
    return {(j["strategy"], j["judge"]): j for j in document["judges"]}


def test_recorded_and_live_judges_side_by_side(tmp_path: Path) -> None:
    folder, data = tmp_path / "run", pocket_items(tmp_path / "items.jsonl", 60)
    common = ("run", "agreement", "-c", CONFIG, "--run-dir", str(folder), f"data.path={data}", "data.num_shards=4")
    replayed = run(*common)
    assert "report.md" in replayed.output and engine_calls(folder) == {}
    found = judged(folder)
    assert found["combined_10", "always right"]["kappa"] == 1.0
    assert found["combined_10", "always first"]["kappa"] == pytest.approx(0.0)

    live = (
        "models.judge.model=pocket:judge", "models.judge.dtype=float32", "models.judge.max_model_len=256",
        'ask.judges=[{name: pocket}, {name: again}]', "ask.strategy_templates=pocket",
        "ask.asking.reason_chars=160", "ask.sampling.max_tokens=64",
    )  # fmt: skip
    direct = "{kind: direct, orders: both}"
    asked = run(*common, *live, f"ask.strategies=[{direct}]")
    assert asked.living_engines() == []
    # Two judges on one model and prompt are one remembered call.
    first = engine_calls(folder)["ask-judge"]
    assert 2 * 60 <= first < 3 * 60
    one, other = (judged(folder)["direct", name] for name in ("pocket", "again"))
    assert one["kappa"] == other["kappa"] and one["kappa"] > 0.5 and one["missing"] <= 3
    assert one["accuracy_no_ties"]["value"] > 0.9
    assert one["flip_rate"]["value"] < 0.1

    more = run(*common, *live, f"ask.strategies=[{direct}, {{kind: independent, low: 1}}]")
    usage = manifest(folder)["stages"]["ask-judge"]["usage"]
    assert usage["calls_log"] >= first and 2 * 60 <= usage["calls_engine"] <= 3 * 60 and more.living_engines() == []
    assert judged(folder)["independent_10", "pocket"]["accuracy"]["value"] > 0.7
    assert judged(folder)["combined_10", "always right"]["kappa"] == 1.0

    page = (folder / "report" / "report.md").read_text()
    (folder / "report" / "report.md").unlink()
    run("report", str(folder))
    assert (folder / "report" / "report.md").read_text() == page
    assert "makes no training rows to audit" in run("audit", str(folder), expect=2).output


def test_a_mistake_in_the_file_is_told_by_line_and_field(tmp_path: Path) -> None:
    data = tmp_path / "items.jsonl"
    data.write_text('{"item_id": "x", "human_label": "C"}\n')
    refused = run("run", "agreement", "-c", CONFIG, "--run-dir", str(tmp_path / "run"), f"data.path={data}", expect=2)
    assert "items.jsonl: line 1: human_label must be one of A, B, tie" in refused.output
    assert "Traceback" not in refused.output
