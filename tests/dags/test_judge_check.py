"""`quorum judge-check` at an HTTP endpoint, as a user types it: the card, resuming, and the floor of another run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.judge_card.probes import ProbeSettings
from tests.endpoint import Answer, Endpoint, said
from tests.operate.at_an_endpoint import command, config, quorum, reply

JUDGEBENCH = Path(__file__).parents[1] / "data" / "public_sets" / "judgebench.jsonl"
PAIRS = ProbeSettings().load().pairs
RIGHT = {pair.right for pair in PAIRS} | {"3 times 4 is 12, so A.", "Ben is younger."}


def credulous(body: dict[str, Any], number: int) -> Answer:
    """A judge that knows every answer, and believes a quoted verdict."""
    if "answer_A" not in body["messages"][-1]["content"]:
        return reply(body, number)  # a test call
    shown = re.findall(r"<answer_([AB]) \w+>\n(.*?)\n</answer_", body["messages"][-1]["content"], re.DOTALL)
    liked = [label for label, text in shown if "choose this answer" in text]
    liked += [label for label, text in shown if any(right in text for right in RIGHT)]
    return said(json.dumps({"reason": "as I know", "choice": liked[0] if liked else "C"}))


def test_what_the_command_cannot_use_is_named() -> None:
    for arguments, told in (
        ([], "name the model of the judge, or a configuration with -c"),
        (["probes.limit=4"], "name the model of the judge, or a configuration with -c"),
        (["m", "--api-key-env", "KEY"], "--api-key-env belongs to --endpoint; pass both"),
        (["-c", "judge_check", "--endpoint", "http://127.0.0.1:9/v1"], "--endpoint serves a model; name it"),
        (["m", "--endpoint", "http://127.0.0.1:9/v1", "--set", "judgbench"], "judgebench"),
        (["m", "--endpoint", "http://127.0.0.1:9/v1", "probes=null"], "there is nothing to judge: list `sets`"),
        (["m", "--endpoint", "http://127.0.0.1:9/v1", "--set", "llmbar"], "set llmbar: it is not on the Hub"),
    ):
        assert told in " ".join(quorum("judge-check", *arguments, code=2).split()), arguments


def test_a_card_is_made_once_and_keeps_a_bad_judge_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPBACK_KEY", "sk-loopback-0123456789abcdef")
    run = tmp_path / "card"
    with Endpoint(credulous) as server:
        check = [
            "judge-check",
            "judge",
            "--endpoint",
            server.url,
            "--api-key-env",
            "LOOPBACK_KEY",
            "--run-dir",
            str(run),
        ]
        check += ["--set", f"judgebench={JUDGEBENCH}", "--executor", "inprocess", "probes.limit=4"]
        check += ["models.judge.endpoint.prices={input: 1000.0, output: 1000.0}"]
        told = quorum(*check)
        assert "JudgeBench 100.0 %, most misled by injection (-100.0 points)" in " ".join(told.split())
        (judge,) = json.loads((run / "report" / "judge_card.json").read_text())["judges"]
        shares = {score["name"]: (score["share"]["mean"], score["share"]["rows"]) for score in judge["scores"]}
        calls = (7 * 4 + 2) * 2  # plain, five probes and a control, each pair in both orders
        assert shares["judgebench"] == (1.0, 2) and shares["injection"] == (0.0, 4) and shares["format"] == (1.0, 4)
        assert shares["order"] == (1.0, 4) and shares["read"] == (1.0, calls)
        assert judge["cost_per_1000"] == pytest.approx(1000 * (10 + 5) / 1000) and judge["seconds_per_1000"] > 0
        assert judge["facts"]["identity"] == {"model": f"endpoint:judge@{server.url}"}

        asked = len(server.asked)
        quorum(*check)
        quorum(*check, "measure.seed=1")  # another interval: no call
        assert len(server.asked) == asked

        values = config(server.url, train=None)
        del values["models"]["policy"]
        card: dict[str, Any] = {"path": str(run), "floor": {"injection": 0.5, "judgebench": 0.6}}
        values["models"]["judge"]["card"] = card
        refused = " ".join(quorum(*command("run", tmp_path, values), code=2).split())
        assert "judge judge: injection is 0.0 %, below the floor of 50.0 %" in refused
        assert "nothing was started" in refused and "change models.judge.card.floor" in refused
        card["floor"] = {"judgebench": 0.6}
        assert "above its floor" in quorum(*command("check", tmp_path, values, "--offline"))
        card["floor"] = {"llmbar": 0.6}
        missing = " ".join(quorum(*command("check", tmp_path, values, "--offline"), code=2).split())
        assert "llmbar is not on the card, which has judgebench, plain, order" in missing
        values["models"]["writer"]["card"] = {"path": str(run)}
        other = " ".join(quorum(*command("check", tmp_path, values, "--offline"), code=2).split())
        assert "is a card of judge, not of writer with these weights" in other
        assert [body for body in server.asked[asked:] if len(str(body)) > 1500] == []  # test calls alone
