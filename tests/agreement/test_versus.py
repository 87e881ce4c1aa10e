"""Configurations against baselines: the published eight, what they share, and the shard that compares."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from ray_pipeline.agreement import versus
from ray_pipeline.agreement.recorded_winrate import versus_rates
from ray_pipeline.agreement.versus import LiveWinrate, VersusJudge, eight, versus_stages
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.feedback.loop import LoopRules
from ray_pipeline.graph.stage import Dag, ShardInput, ShardOutput, Stage, StageResult, WholeWork
from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import CANDIDATES, PROMPTS, to_table
from tests.scripted import ScriptedEngine

PROMPTS_BLOCK = PromptsConfig.model_validate({"sources": [{"type": "pocket", "count": 8, "seed": 0}], "num_shards": 1})

TWINS = [{"name": "r", "model": "y"}, {"name": "s", "model": "y"}]


def live(**changes: Any) -> LiveWinrate:
    return LiveWinrate(**{"prompts": PROMPTS_BLOCK, "pair": ("llama", "gemma"), **changes})


def stages(settings: LiveWinrate, tmp_path: Path) -> tuple[list[Stage], Stage]:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    models = {name: ModelSettings(model=str(folder)) for name in settings.models}
    prompts = Stage("prompts", WholeWork(lambda given: {}, tables=("prompts",)), None)
    return versus_stages(settings, models, prompts)


def test_the_published_eight_are_each_model_alone_and_reviewed_by_itself_the_other_and_both() -> None:
    found = {c.name: (c.generator, [r.model for r in c.reviewers]) for c in eight("llama", "gemma")}
    assert found == {
        "llama": ("llama", []),
        "llama-by-llama": ("llama", ["llama"]),
        "llama-by-gemma": ("llama", ["gemma"]),
        "llama-by-both": ("llama", ["llama", "gemma"]),
        "gemma": ("gemma", []),
        "gemma-by-gemma": ("gemma", ["gemma"]),
        "gemma-by-llama": ("gemma", ["llama"]),
        "gemma-by-both": ("gemma", ["gemma", "llama"]),
    }
    # Against each of them alone; a model is not compared with itself.
    assert len(live().runs) == 14 and len(live(baselines=("llama", "gemma", "mistral")).runs) == 22
    assert live().models == ["llama", "gemma", "judge"]


def test_loops_of_one_generator_share_its_first_response(tmp_path: Path) -> None:
    made, compared = stages(live(loop=LoopRules(responses=2)), tmp_path)
    Dag("winrate", [next(iter(compared.inputs.values())), *made, compared])  # every name is one stage, in a good order
    names = [stage.name for stage in made]
    assert names.count("llama-generate-1") == names.count("gemma-generate-1") == 1
    assert sum(name.endswith("generate-2") for name in names) == 6
    reviewed = {name: stage for name, stage in ((s.name, s) for s in made) if name.endswith("review-1")}
    assert {s.inputs["last"].name for s in reviewed.values()} == {"llama-generate-1", "gemma-generate-1"}
    both = [name for name in names if name.startswith("llama-by-both-review-1-")]
    assert sorted(both) == ["llama-by-both-review-1-gemma", "llama-by-both-review-1-llama"]
    assert compared.inputs["configuration/llama"] is compared.inputs["baseline/llama"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pair": None}, "set either pair"),
        ({"configurations": [{"name": "x", "generator": "x"}]}, "set either pair"),
        ({"pair": ("llama", "llama")}, "names llama twice"),
        ({"pair": None, "configurations": [{"name": "x", "generator": "x"}]}, "nothing to compare"),
        (
            {"pair": None, "configurations": [{"name": "x", "generator": "x"}] * 2},
            "configurations have the same name: x",
        ),
        ({"pair": None, "configurations": [{"name": "a-vs-b", "generator": "x"}]}, "a name cannot contain -vs-"),
        ({"loop": {"responses": 1}}, "set it to 2 or more"),
        ({"baselines": ("llama", "llama")}, "two baselines have the same name: llama"),
        ({"baselines": ()}, "at least 1 item"),
        ({"prompts": {**PROMPTS_BLOCK.model_dump(), "val_fraction": 0.5}}, "val_fraction has no effect"),
        (
            {
                "pair": None,
                "configurations": [
                    {
                        "name": "x",
                        "generator": "x",
                        "reviewers": [{"name": "r", "model": "y"}, {"name": "s", "model": "y"}],
                    }
                ],
            },
            "are the same",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        live(**changes)


# --- the shard that compares ------------------------------------------------------------------------------------------


def answers(**said: list[str | None]) -> Any:
    """Candidates: by prompt the responses of its loop, first to last."""
    rows = [
        {
            "candidate_id": f"{prompt}/{k}",
            "prompt_id": prompt,
            "k": k,
            "seed": 0,
            "response": text,
            "finish_reason": "stop" if text else "error",
            "generator": "g",
            "prompt_tokens": None,
            "completion_tokens": None,
        }
        for prompt, texts in said.items()
        for k, text in enumerate(texts)
    ]
    return to_table(rows, CANDIDATES)


def longer(messages: Any, sampling: Any) -> str:
    """A judge that takes the longer answer, and the first where both are of one length."""
    shown = re.findall(r"<answer_[A-Z] [0-9a-f]+>\n(.*?)\n</answer", messages[-1]["content"])
    return json.dumps({"reason": "r", "choice": "B" if len(shown[1]) > len(shown[0]) else "A"})


def compare(tmp_path: Path, engine: ScriptedEngine, settings: dict[str, Any], **tables: Any) -> ShardOutput:
    compared_by = live(
        pair=None,
        configurations=[
            {"name": "alone", "generator": "m"},
            {"name": "loop", "generator": "m", "reviewers": [{"name": "r", "model": "n"}]},
        ],
        baselines=["m", "other"],
        **settings,
    )
    _, compared = stages(compared_by, tmp_path)
    prompts = [
        {"prompt_id": pid, "messages": [{"role": "user", "content": f"Q {pid}"}], "source": "t", "task_type": "t",
         "split": "train", "meta": "{}"}
        for pid in ("a1", "a2", "a3")
    ]  # fmt: skip

    async def go() -> ShardOutput:
        async with LoggedEngine(engine, Folder(str(tmp_path / "calls")), 0, 1) as logged:
            given = ShardInput(
                0,
                1,
                {"prompts": to_table(prompts, PROMPTS), **tables},
                {},
                logged,
                compared.work.settings,  # type: ignore[union-attr]
                lambda rows: None,
                lambda *said: None,
            )
            return await compared.work.function(given)  # type: ignore

    return asyncio.run(go())


def test_the_last_response_of_a_loop_is_compared_and_what_is_missing_is_no_win(tmp_path: Path) -> None:
    engine = ScriptedEngine(longer)
    alone = answers(a1=["aa"], a2=["aa"], a3=["aa"])
    loop = answers(a1=["aa", "aaaa", None], a2=["aa"], a3=[None])
    other = answers(a1=["bbb"], a2=["bb"], a3=["b"])
    tables = {"configuration/alone": alone, "configuration/loop": loop, "baseline/m": alone, "baseline/other": other}
    direct = {"judge": VersusJudge(kind="direct"), "answer": "last"}
    found = compare(tmp_path, engine, direct, **tables).tables
    assert found["items"]["question"].to_pylist() == ["Q a1", "Q a2", "Q a3"]
    rates = {r.run: r for r in versus_rates(found["items"], found["ballots"], draws=100)}
    assert set(rates) == {"alone-vs-other", "loop-vs-m", "loop-vs-other"}

    def counts(run: str) -> tuple[int, ...]:
        return rates[run].wins, rates[run].ties, rates[run].losses, rates[run].missing

    # a2: one length, so the judge takes what is shown first, and its two orders make a tie.
    assert counts("alone-vs-other") == (1, 1, 1, 0) and counts("loop-vs-other") == (1, 1, 0, 1)
    assert counts("loop-vs-m") == (1, 1, 0, 1)  # a2 says the same: a tie without a call
    assert rates["loop-vs-m"].flip_rate.value == 0
    asked = {messages[-1]["content"] for messages, _ in engine.asked}
    # Both orders of alone with other (3 prompts), of loop with m (a1) and with other (a1; a2 is alone with other).
    assert len(asked) == engine.calls == 10


def graded(messages: Any, sampling: Any) -> str:
    """A judge that grades an answer by its length, at most 9; "unreadable" answers are."""
    shown = re.findall(r"<answer_([A-Z]) [0-9a-f]+>\n(.*?)\n</answer", messages[-1]["content"])
    if any("unreadable" in text for _, text in shown):
        return "hm"
    return json.dumps({"reason": "r", **{f"score_{label.lower()}": min(len(text), 9) for label, text in shown}})


def test_the_published_rate_compares_the_picked_response_by_combined_scores(tmp_path: Path) -> None:
    engine = ScriptedEngine(graded)
    alone = answers(a1=["aa"], a2=["aa"], a3=["aa"])
    loop = answers(a1=["aa", "aaaaa", "a"], a2=["aaaa", "aaaa!", "aaaa?"], a3=["unreadable", "b"])
    other = answers(a1=["bbb"], a2=["bbbbb"], a3=["b"])
    tables = {"configuration/alone": alone, "configuration/loop": loop, "baseline/m": alone, "baseline/other": other}
    assert (live().judge.kind, live().judge.strategy.scale.high, live().answer) == ("combined", 10, "picked")
    found = compare(tmp_path, engine, {}, **tables).tables
    rates = {r.run: r for r in versus_rates(found["items"], found["ballots"], draws=100)}

    def counts(run: str) -> tuple[int, ...]:
        return rates[run].wins, rates[run].ties, rates[run].losses, rates[run].missing

    # a1: the second of three is picked; a2: the first of two with the highest grade, as good as the other; a3: no pick.
    assert counts("loop-vs-other") == (1, 1, 0, 1) and counts("loop-vs-m") == (2, 0, 0, 1)
    assert counts("alone-vs-other") == (1, 0, 2, 0)
    scores = {row["score_a"] for row in found["ballots"].to_pylist() if row["judge"] == "loop-vs-m"}
    assert 5.0 in scores and None in scores
    (tmp_path / "last").mkdir()
    last = compare(tmp_path / "last", ScriptedEngine(graded), {"answer": "last"}, **tables).tables
    rates = {r.run: r for r in versus_rates(last["items"], last["ballots"], draws=100)}
    assert counts("loop-vs-other") == (0, 2, 1, 0)  # the last of each: "a" < "bbb", one grade, and the same text


def test_a_response_that_was_cut_off_is_counted_and_compared_only_where_there_is_no_other(tmp_path: Path) -> None:
    """K4.1"""
    table = answers(a1=["aa", "aaaaa", None], a2=["aa", "b"], a3=["c"])
    ends = {"a1/1": "length", "a2/0": "content_filter", "a3/0": "length"}
    reasons = [ends.get(name, "stop") for name in table["candidate_id"].to_pylist()]
    place = table.schema.get_field_index("finish_reason")
    table = table.set_column(place, table.schema.field(place), pa.array(reasons))
    assert versus.responses(table) == {"a1": ["aa"], "a2": ["b"], "a3": ["c"]}
    found = [
        StageResult(name, "f", str(tmp_path / name), 1, ("candidates",), {}, {}) for name in ("first", "whole-loop")
    ]
    for result in found:  # the joined table of a loop has the rows of its stages again
        result.table("candidates").write(0, table)
    assert (versus.cut_responses(found), versus.cut_responses([])) == (3, None)


def test_a_pick_and_its_judge_are_in_fingerprint_and_protocol(tmp_path: Path) -> None:
    kinds = {
        "published": live(),
        "last": live(answer="last"),
        "direct": live(judge=VersusJudge(kind="direct")),
        "five": live(judge=VersusJudge(high=5)),
        "one by one": live(judge=VersusJudge(kind="independent")),
    }
    assert len({stages(settings, tmp_path)[1].fingerprint for settings in kinds.values()}) == len(kinds)
    models = {name: ModelSettings(model=str(tmp_path / "model")) for name in live().models}
    protocols = {name: settings.protocol(models) for name, settings in kinds.items() if name in ("published", "last")}
    assert "picked" in str(protocols["published"]) and "picked" not in str(protocols["last"])
