"""Judges and debaters asked by the shard, with an engine that answers from a script."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ray_pipeline.agents.debate import DebateSettings, load_debate_templates
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.strategies import Strategy, StrategyAsking, load_strategy_templates
from ray_pipeline.agreement import ask
from ray_pipeline.agreement.ask import AskSettings, LiveJudge
from ray_pipeline.agreement.document import measure
from ray_pipeline.agreement.measure_settings import MeasureSettings
from ray_pipeline.agreement.recorded import read_item
from ray_pipeline.engines.base import PromptTooLong
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.stage import ShardInput, ShardOutput, Stage, StageStop, WholeWork
from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import BALLOTS, ITEMS, SPEECHES, to_table
from tests.scripted import ScriptedEngine

GOOD, BAD = "good", "bad"


def items(*pairs: tuple[str | None, str, str]) -> Any:
    rows = [
        read_item("", {"item_id": f"i{n}", "question": f"Q{n}", "response_a": a, "response_b": b, "human_label": label})
        for n, (a, b, label) in enumerate(pairs)
    ]
    return to_table(rows, ITEMS)


TABLE = items((GOOD, BAD, "A"), (BAD, GOOD, "B"), (GOOD, GOOD, "tie"), (BAD, GOOD, "B"))


def knows(messages: Any, sampling: Any) -> str:
    """A judge that knows which answers are good, and speaks when it is in a debate."""
    shown = re.findall(r"<answer(?:_[A-Z])? [0-9a-f]+>\n(.*?)\n</answer", messages[-1]["content"])
    values = [9 if answer == GOOD else 2 for answer in shown]
    if sampling.grammar is None:
        return "I have heard enough."
    names = sampling.grammar.decoded()["properties"]
    if "choice" in names:
        return json.dumps({"reason": "r", "choice": "C" if len(set(values)) == 1 else "AB"[values.index(9)]})
    if "score" in names:
        return json.dumps({"reason": "r", "score": values[0]})
    return json.dumps({"reason": "r", "score_a": values[0], "score_b": values[1]})


class Asked:
    """One shard that is asked, and what it told the outside."""

    def __init__(self, function: Any, settings: Any, engine: ScriptedEngine, root: Path, table: Any = TABLE) -> None:
        self.watched: list[tuple[str, bool]] = []
        self.ticks = 0

        async def go() -> ShardOutput:
            async with LoggedEngine(engine, Folder(str(root)), 0, 1) as log:
                tables = {"items.items": table, "items.ballots": BALLOTS.empty_table()}
                return await function(ShardInput(0, 1, tables, {}, log, settings, self._tick, self._watch))

        self.output = asyncio.run(asyncio.wait_for(go(), 60))
        self.ballots = self.output.tables["ballots"].to_pylist()

    def _tick(self, rows: int) -> None:
        self.ticks += rows

    def _watch(self, name: str, read: bool) -> None:
        self.watched.append((name, read))
        if len(self.watched) > 50:
            raise StageStop("enough")


def judges(*strategies: dict[str, Any], names: tuple[str, ...] = ("one",), **more: Any) -> Any:
    return ask._Judges(
        judges=tuple(LiveJudge(name=name) for name in names),
        strategies=tuple(Strategy(**s) for s in strategies),
        templates=load_strategy_templates("default"),
        layout="shared_first",
        sampling=SamplingSettings(max_tokens=64),
        asking=StrategyAsking(**more),
    )


def debaters(**rules: Any) -> Any:
    return ask._Debaters(
        debaters=(LiveJudge(name="one"),),
        rules=DebateSettings(**rules),
        templates=load_debate_templates("default"),
        sampling=SamplingSettings(max_tokens=64),
        asking=StrategyAsking(),
    )


ALL = ({"kind": "direct", "orders": "both"}, {"kind": "independent"}, {"kind": "combined", "orders": "swapped"})


def test_every_strategy_of_every_judge_on_every_item(tmp_path: Path) -> None:
    engine = ScriptedEngine(knows)
    asked = Asked(ask.ASK, judges(*ALL), engine, tmp_path)
    assert asked.output.tables["ballots"].schema.equals(BALLOTS)
    assert [(b["item_id"], b["strategy"], b["order"], b["vote"]) for b in asked.ballots[:4]] == [
        ("i0", "direct", "ab", "A"), ("i0", "direct", "ba", "A"),
        ("i0", "independent_10", "ab", "A"), ("i0", "combined_10", "ba", "A"),
    ]  # fmt: skip
    assert (asked.ballots[3]["score_a"], asked.ballots[3]["score_b"]) == (9.0, 2.0)
    assert len(asked.ballots) == 16 and asked.ticks == 12
    assert {name for name, _ in asked.watched} == {
        "judge one (direct)", "judge one (independent_10)", "judge one (combined_10)",
    }  # fmt: skip
    assert asked.output.counts == {
        "direct.one.ok": 8, "independent_10.one.ok": 4, "combined_10.one.ok": 4,
    }  # fmt: skip
    document = measure(TABLE, asked.output.tables["ballots"], MeasureSettings(draws=100))
    assert [j.agreement.kappa for j in document.judges] == [1.0] * 3 and document.judges[1].flip_rate.value == 0.0


def test_an_answered_call_is_not_asked_again(tmp_path: Path) -> None:
    first, again = ScriptedEngine(knows), ScriptedEngine(knows)
    one = Asked(ask.ASK, judges(*ALL), first, tmp_path)
    # A second judge on the same model and prompt is one remembered call.
    two = Asked(ask.ASK, judges(*ALL, names=("one", "two")), again, tmp_path)
    assert first.calls > 0 and again.calls == 0
    assert [b for b in two.ballots if b["judge"] == "one"] == one.ballots and len(two.ballots) == 2 * len(one.ballots)
    more = ScriptedEngine(knows)
    Asked(ask.ASK, judges(*ALL, {"kind": "combined", "high": 20}), more, tmp_path)
    assert more.calls == 4


def test_a_judges_own_rubric_and_sampling(tmp_path: Path) -> None:
    given = judges({"kind": "combined"}, names=("plain", "polite"))
    polite = LiveJudge(name="polite", rubric="Is it polite?", sampling=SamplingSettings(temperature=0.3, max_tokens=8))
    given = given.model_copy(update={"judges": (given.judges[0], polite)})
    engine = ScriptedEngine(knows)
    Asked(ask.ASK, given, engine, tmp_path)
    by_rubric = {"Is it polite?" in messages[-1]["content"]: s for messages, s in engine.asked}
    assert (by_rubric[True].temperature, by_rubric[True].max_tokens) == (0.3, 8) and by_rubric[False].max_tokens == 64


def test_an_item_without_texts_is_skipped_and_one_that_is_too_long_is_no_fault(tmp_path: Path) -> None:
    table = items((GOOD, BAD, "A"), (None, BAD, "B"), ("long", BAD, "A"))
    engine = ScriptedEngine(
        lambda m, s: PromptTooLong(9, 9, 9) if "long" in m[-1]["content"].split("Weigh")[0] else knows(m, s)
    )
    asked = Asked(ask.ASK, judges({"kind": "combined"}), engine, tmp_path, table)
    assert [(b["parse_status"], b["vote"]) for b in asked.ballots] == [
        ("ok", "A"),
        ("skipped", None),
        ("too_long", None),
    ]
    assert asked.watched == [("judge one (combined_10)", True)]
    talked = Asked(ask.DEBATE, debaters(rounds=0), ScriptedEngine(knows), tmp_path / "d", table)
    assert [b["parse_status"] for b in talked.ballots if b["item_id"] == "i1"] == ["skipped"] * 3


def test_debates_write_ballots_by_voice_and_every_speech(tmp_path: Path) -> None:
    engine = ScriptedEngine(knows)
    asked = Asked(ask.DEBATE, debaters(), engine, tmp_path)
    speeches = asked.output.tables["speeches"]
    assert speeches.schema.equals(SPEECHES) and speeches.num_rows == 4 * 6 and engine.calls == 4 * 9
    assert [(b["voice"], b["vote"]) for b in asked.ballots[:3]] == [
        ("general_public", "A"), ("psychologist", "A"), ("critic", "A"),
    ]  # fmt: skip
    (debate,) = measure(TABLE, asked.output.tables["ballots"], MeasureSettings(draws=100)).debates
    assert debate.judged.agreement.kappa == 1.0 and debate.debater == "one"
    again = ScriptedEngine(knows)
    Asked(ask.DEBATE, debaters(), again, tmp_path)
    assert again.calls == 0


# --- settings and stages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"judges": [{"name": "a"}]}, "judges have no effect without strategies"),
        ({"strategies": [{"kind": "direct"}]}, "strategies have no effect without judges"),
        ({"judges": [{"name": "a"}] * 2, "strategies": [{"kind": "direct"}]}, "two judges have the same name: a"),
        (
            {"judges": [{"name": "a"}], "strategies": [{"kind": "direct"}] * 2},
            "strategies have the same name: direct",
        ),
        ({"judges": [{"name": "a"}], "strategies": [{"kind": "direct", "name": "debate"}]}, "a reserved name"),
        ({"debaters": [{"name": "a", "rubric": "x"}]}, "a debater has no rubric"),
        (
            {"judges": [{"name": "a"}], "strategies": [{"kind": "combined", "orders": "both", "conflict": "mean"}]},
            r"strategy combined_10: conflict has no effect here; set measure\.conflict",
        ),
        (
            {"debaters": [{"name": "a"}], "debate": {"conflict": "tie"}},
            r"debate: conflict has .* set measure\.conflict",
        ),
        ({"debaters": [{"name": "a"}], "debate": {"pool": "vote"}}, r"debate: pool has .* set measure\.debate"),
    ],
)
def test_an_ask_block_that_does_not_fit(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AskSettings(**block)


def test_a_block_that_was_written_out_can_be_read_again() -> None:
    block = {
        "judges": [{"name": "a"}], "strategies": [{"kind": "direct", "orders": "both"}], "debaters": [{"name": "a"}],
        "debate": {"rounds": 1},
    }  # fmt: skip
    settings = AskSettings.model_validate(block)
    written = settings.model_dump(mode="json")
    assert "conflict" not in {**written["debate"], **written["strategies"][0]} and "pool" not in written["debate"]
    assert AskSettings.model_validate(written) == settings


def test_each_model_is_a_stage_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelSettings, "weights", lambda self: {"weights": self.model})
    settings = AskSettings.model_validate(
        {
            "judges": [{"name": "a", "model": "m"}, {"name": "b", "model": "n"}, {"name": "c", "model": "m"}],
            "strategies": [{"kind": "direct"}],
            "debaters": [{"name": "d", "model": "n"}],
        }
    )
    models = {key: ModelSettings(model=key) for key in ("m", "n")}
    start = Stage("items", WholeWork(lambda given: {}, tables=("items", "ballots")), {})
    texts = load_strategy_templates("default"), load_debate_templates("default")

    def stages(s: AskSettings) -> dict[str, Stage]:
        return {stage.name: stage for stage in ask.ask_stages(s, *texts, models, start)}

    found = stages(settings)
    assert list(found) == ["ask-m", "ask-n", "debate-n"]
    assert [j.name for j in found["ask-m"].work.settings.judges] == ["a", "c"]
    changed = stages(settings.model_copy(update={"debate": DebateSettings(rounds=3)}))
    assert changed["ask-m"].fingerprint == found["ask-m"].fingerprint
    assert changed["debate-n"].fingerprint != found["debate-n"].fingerprint
