"""Probes and the figures of a card, from verdicts of judges whose faults are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pytest

from ray_pipeline.agents.strategies import shown_orders
from ray_pipeline.agents.templates import TemplateError
from ray_pipeline.engines.usage import Usage
from ray_pipeline.judge_card.measure import JudgeCard, JudgeFacts, Score, judge_card
from ray_pipeline.judge_card.page import card_page
from ray_pipeline.judge_card.probes import Probe, ProbeSettings, probe_items
from ray_pipeline.judge_card.section import cards_section
from ray_pipeline.operate.side_by_side import Side, side_by_side
from ray_pipeline.report.documents import as_json
from ray_pipeline.report.markdown import render_markdown
from ray_pipeline.store.schemas import CARD_ITEMS, CARD_VERDICTS, to_table
from tests.evaluate.example_run import whole_run

#: (item, label of the answer that is shown first) → label of the best answer, several, or None.
Judge = Callable[[Mapping[str, Any], str], str | None]
FACTS = JudgeFacts("j", "model", {"model": "m1"}, "qwen", "pairs by direct")


def right(item: Mapping[str, Any], first: str) -> str | None:
    return item["votes"][0]


def carded(judge: Judge, items: list[dict[str, Any]], usage: Usage | None = None) -> JudgeCard:
    verdicts = [
        {
            **{name: item[name] for name in ("item_id", "prompt_id", "source")},
            "judge": "j",
            "strategy": "direct",
            "order": "".join("ABCD"[n] for n in order),
            "best": judge(item, "ABCD"[order[0]]),
            "reason": None,
            "parse_status": "ok",
            "raw": None,
            "prompt_cut": None,
        }
        for item in items
        for order in shown_orders("both", 2)
    ]
    table: pa.Table = to_table(verdicts, CARD_VERDICTS)
    return judge_card(FACTS, to_table(items, CARD_ITEMS), table, usage or Usage(), usage or Usage(), draws=200)


def probed(judge: Judge, texts: str = "default") -> dict[str, Score]:
    return {
        score.name: score
        for score in carded(judge, list(probe_items(ProbeSettings(texts=texts).load(), ["qwen"]))).scores
    }


def test_a_perfect_judge_has_all_points_and_no_interval_without_width() -> None:
    scores = probed(right)
    assert set(scores) == {"plain", "order", "length", "verbosity", "self_family", "injection", "format", "read"}
    for score in scores.values():
        assert score.share.mean == 1.0 and score.share.low is not None and 0.85 < score.share.low < 1.0
    assert scores["length"].effect is not None and scores["length"].effect.mean == 0.0


def test_a_judge_of_length_is_found() -> None:
    scores = probed(lambda item, first: max("AB", key=lambda label: len(item["answers"]["AB".index(label)])))
    plain = scores["plain"].share.mean
    assert plain is not None and scores["length"].share.mean == 0.0
    assert scores["length"].effect is not None and scores["length"].effect.mean == pytest.approx(-plain)
    assert scores["length"].effect.high is not None and scores["length"].effect.high < 0
    assert scores["order"].share.mean == 1.0


def test_a_judge_of_the_first_answer_contradicts_itself_everywhere() -> None:
    scores = probed(lambda item, first: first)
    assert scores["order"].share.mean == 0.0 and scores["plain"].share.mean == 0.0


def test_a_judge_of_its_own_family_is_found_against_the_control() -> None:
    def loyal(item: Mapping[str, Any], first: str) -> str | None:
        own = [label for label, text in zip("AB", item["answers"], strict=True) if "Answer by qwen" in text]
        return own[0] if own else right(item, first)

    score = probed(loyal)["self_family"]
    assert score.share.mean == 0.0 and score.effect is not None and score.effect.mean == -1.0


def test_unread_replies_are_counted_and_not_guessed() -> None:
    scores = probed(lambda item, first: None if first == "B" else "A")
    assert scores["read"].share.mean == 0.5 and scores["plain"].unread == 0.5
    assert scores["plain"].share.mean == 1.0  # JudgeBench's rule: the order that was read decides
    assert "order" not in scores


def test_only_judges_of_a_family_see_its_items() -> None:
    texts = ProbeSettings(only=("self_family", "length"), limit=3).load()
    items = list(probe_items(texts, ["qwen", "gpt"]))
    assert sum(item["family"] is None for item in items) == 3 * 2  # plain and length
    assert sum(item["family"] == "gpt" for item in items) == 3 * 2  # the probe and its control
    own = [item for item in items if item["family"] == "gpt" and item["subset"] == "self_family"]
    assert all("by Llama" in item["answers"][0] and "by gpt" in item["answers"][1] for item in own)
    assert len({item["item_id"] for item in items}) == len(items)


def test_probes_that_cannot_be_used_are_named(tmp_path: Any) -> None:
    with pytest.raises(TemplateError, match=r"probes\.only: default has no probe 'lenght'; choose from order, length"):
        ProbeSettings(only=("lenght",)).load()
    file = tmp_path / "mine.yaml"
    file.write_text("pairs: [{question: a, right: b, wrong: c}, {question: d, right: e, wrong: f}]\nprobes: ")
    for probes, told in (
        ("{x: {about: y, wrong: '{{ wrnog }}'}}", r"probes\.x\.wrong: .*wrnog"),
        ("{plain: {about: y}}", "plain is a reserved name"),
    ):
        broken = tmp_path / "broken.yaml"
        broken.write_text(file.read_text() + probes)
        with pytest.raises(TemplateError, match=told):
            ProbeSettings(texts=str(broken)).load()


@pytest.mark.parametrize("texts", ["default", "pocket"])
def test_the_shipped_pairs_give_nothing_away(texts: str) -> None:
    """Right and wrong answers have about the same length, so that plain pairs measure no preference for length."""
    pairs = ProbeSettings(texts=texts).load().pairs
    assert len(pairs) == 40
    mean = [sum(len(text) for text in texts) / 40 for texts in zip(*((p.right, p.wrong) for p in pairs), strict=True)]
    assert mean[0] == pytest.approx(mean[1], rel=0.1)
    assert all(isinstance(probe, Probe) and probe.about for probe in ProbeSettings(texts=texts).load().probes.values())


def test_rewardbench_is_the_mean_over_subsets() -> None:
    def item(n: int, subset: str) -> dict[str, Any]:
        row = {"item_id": f"{subset}{n}", "prompt_id": f"{n:032x}", "source": "reward_bench_2", "subset": subset}
        return {**row, "base": None, "family": None, "question": "q", "answers": list("wxyz"), "votes": ["A"]}

    items = [*(item(n, "Math") for n in range(8)), *(item(n, "Safety") for n in range(8, 10))]
    (score, _) = carded(lambda row, first: "A" if row["subset"] == "Safety" else "B", items).scores
    assert score.share.mean == pytest.approx(0.5) and score.subsets == {"Math": 0.0, "Safety": 1.0}


def test_the_page_shows_every_figure_and_a_run_shows_its_judges_card() -> None:
    items = list(probe_items(ProbeSettings(limit=5).load(), ["qwen"]))
    card = carded(right, items, Usage(calls_engine=50, wall_seconds=2.0, cost=0.01))
    document = {"judges": as_json([card]), "currency": "EUR"}
    page = render_markdown(card_page(document, {"length": "long"}, items=len(items), verdicts=70, usage=Usage()))
    for text in (
        "self family",
        "| j | length | long | 5 | 100.0 % |",
        "EUR per 1,000 calls",
        "| j | 0.0 % | 40.0 | 0.2000 |",
    ):
        assert text in page, text
    section = cards_section({"judge": document["judges"]})
    assert section is not None and cards_section({}) is None
    (table, _) = section.blocks
    assert ["judge", "j", "plain", "100.0 %"] in [row[:4] for row in table.rows]  # type: ignore[union-attr]


def test_two_cards_are_compared_by_judge_and_score() -> None:
    items = list(probe_items(ProbeSettings(limit=4).load(), ["qwen"]))
    sides = [
        Side(name, name, "judge_check", {}, {}, {}, {"judges": as_json([carded(judge, items)])})
        for name, judge in (("one", right), ("other", lambda item, first: first))
    ]
    rates = {row.name: row for part in side_by_side(*sides) if part.kind == "rates" for row in part.rows}
    assert rates["j: order"].difference == "-100.0" and rates["j: read replies"].difference == "+0.0"


def test_the_report_of_a_run_has_the_section(tmp_path: Any) -> None:
    from ray_pipeline.evaluate.build import build_report

    card = as_json(carded(right, list(probe_items(ProbeSettings(limit=5).load(), ["qwen"]))))
    build_report(whole_run(cards={"judge": [card]}), tmp_path)
    assert "## Judge cards" in (tmp_path / "report.md").read_text()
