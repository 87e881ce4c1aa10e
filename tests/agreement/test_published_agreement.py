"""Published agreement numbers, from recorded judgements of other people's judges.

Stored scores and verdicts are numbers in tests/data/published; reading the judges' replies needs their texts.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from ray_pipeline.agreement.document import as_document, measure
from ray_pipeline.agreement.measure_settings import MeasureSettings
from ray_pipeline.agreement.recorded import Recorded, read_recorded
from ray_pipeline.agreement.recorded_winrate import versus_rates
from ray_pipeline.store.schemas import BALLOTS, ITEMS, to_table
from tests.published import DATA, NUMBERS, needs

RECORDED = DATA / "agreement"

STRATEGIES = {
    "direct-comparison": "direct",
    "independent-scoring-10": "independent_10",
    "combined-scoring-5": "combined_5",
    "combined-scoring-10": "combined_10",
    "combined-scoring-100": "combined_100",
}
REPLAYS = ["stored", pytest.param("text", marks=needs("agreement"))]


@functools.cache
def published() -> dict[str, Any]:
    return json.loads((NUMBERS / "agreement.json").read_text())


@functools.cache
def recorded(name: str, replay: Any) -> Recorded:
    folder = NUMBERS if replay == "stored" else RECORDED
    return read_recorded(str(folder / f"{name}.jsonl.gz"), replay)


@functools.cache
def document(name: str, replay: str) -> dict[str, Any]:
    found, settings = recorded(name, replay), MeasureSettings(draws=100)
    return as_document(measure(to_table(found.items, ITEMS), to_table(found.ballots, BALLOTS), settings), settings, {})


@pytest.mark.parametrize("replay", REPLAYS)
def test_six_judges(replay: str) -> None:
    judges = {j["judge"]: j for j in document("fair_eval", replay)["judges"]}
    expected, counts = published()["table3_judge"], published()["benchmarks"]["fair-eval"]
    assert len(judges) == len(expected) == 6
    for row in expected:
        kappa = row["reproduced" if replay == "stored" else "clean_text"]
        assert judges[row["judge"]]["kappa"] == pytest.approx(kappa, abs=1e-9)
    wanted = counts["vote_counts_stored" if replay == "stored" else "vote_counts_clean"]
    assert {name: j["vote_counts"] for name, j in judges.items()} == wanted
    assert document("fair_eval", replay)["label_counts"] == counts["human_label_counts"]
    assert all((j["n"], j["missing"]) == (80, 0) for j in judges.values())  # 480 of 480 are read


@pytest.mark.parametrize("replay", REPLAYS)
def test_all_57_juries(replay: str) -> None:
    juries = {frozenset(j["jury"]): j for j in document("fair_eval", replay)["juries"]}
    assert len(juries) == len(published()["juries"]) == 57
    for row in published()["juries"]:
        found = juries[frozenset(row["jury"])]
        assert found["kappa"] == pytest.approx(row["reproduced" if replay == "stored" else "clean_text"], abs=1e-9)
        assert found["vote_counts"] == row["vote_counts"]


@pytest.mark.parametrize("replay", REPLAYS)
def test_six_debates(replay: str) -> None:
    debates = {d["debater"]: d for d in document("fair_eval_debate", replay)["debates"]}
    assert len(debates) == len(published()["table5_debate"]) == 6
    for row in published()["table5_debate"]:
        found = debates[row["debater"]]
        assert found["kappa"] == pytest.approx(row["reproduced"], abs=1e-9)
        if replay == "text":  # the stored means have no voices to vote
            assert found["other_rule_kappa"] == pytest.approx(row["majority_of_agent_votes"], abs=1e-9)
            assert set(found["voices"]) == {"general_public", "psychologist", "critic"} and found["missing"] == 0


def test_thirty_cells_of_votes_as_stored() -> None:
    rows = recorded("alpaca_eval", "stored").ballots
    cells: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        cell = cells.setdefault((row["strategy"], row["judge"]), {"A": 0, "B": 0, "tie": 0})
        cell[row["vote"]] += 1
    expected = published()["table2_alpaca_eval_label_free"]
    assert len(cells) == len(expected) == 30
    for row in expected:
        assert cells[STRATEGIES[row["strategy"]], row["judge"]] == row["vote_counts_stored"]


@needs("agreement")
def test_clean_texts_give_back_what_retries_lost() -> None:
    """The original kept B's score alone after a retry; read whole, A has the one that stands in the text."""
    stored = {_key(b): b for b in recorded("alpaca_eval", "stored").ballots}
    clean = {_key(b): b for b in recorded("alpaca_eval", "text").ballots}
    assert stored.keys() == clean.keys()
    lost = [key for key, b in stored.items() if b["score_a"] == -1]
    assert len(lost) == 57
    for key in lost:
        assert clean[key]["parse_status"] == "repaired" and clean[key]["score_b"] == stored[key]["score_b"]
        assert clean[key]["score_a"] >= 0
    # Everything else that has scores is read as it was stored, but for one reply that grades two responses.
    others = [k for k, b in stored.items() if k not in set(lost) and b["score_a"] is not None]
    differing = [k for k in others if (clean[k]["score_a"], clean[k]["score_b"]) != _scores(stored[k])]
    assert differing == [("alpaca-eval/272", "independent_10", "Gemma-2-27b")]
    assert clean[differing[0]]["vote"] is None and clean[differing[0]]["parse_status"] == "unparsed"
    # Direct comparisons differ only where the original took a later "### B" for a tie.
    picks = [k for k, b in stored.items() if k[1] == "direct" and clean[k]["vote"] != b["vote"]]
    assert len(picks) == 18 and all(stored[k]["vote"] == "tie" and clean[k]["vote"] in ("A", "B") for k in picks)


def _key(ballot: dict[str, Any]) -> tuple[str, str, str]:
    return ballot["item_id"], ballot["strategy"], ballot["judge"]


def _scores(ballot: dict[str, Any]) -> tuple[float, float]:
    return ballot["score_a"], ballot["score_b"]


@pytest.mark.parametrize("replay", REPLAYS)
def test_win_rates_of_the_21_runs(replay: str) -> None:
    found = recorded("generator_versus", replay)
    rates = versus_rates(to_table(found.items, ITEMS), to_table(found.ballots, BALLOTS), draws=100)
    expected = {row["run"]: row for row in published()["table6_winrate"] if "wins" in row}
    assert {r.run for r in rates} == set(expected) and len(rates) == 21
    for rate in rates:
        row = expected[rate.run]
        assert rate.win_rate.value == pytest.approx(row["reproduced"], abs=1e-9)
        assert (rate.n, rate.wins, rate.ties) == (500, row["wins"], row["ties"])
        assert rate.losses + rate.missing == row["losses"]  # a run without a text is missing when texts are read
        assert rate.half_tie_rate == pytest.approx(row["half_tie_rate"], abs=1e-9)
    assert sum(r.missing for r in rates) == (0 if replay == "stored" else 6)
