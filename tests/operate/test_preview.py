"""A preview shows prompts to their decisions, and the run that follows does not ask for them again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.endpoint import Answer, Endpoint, said
from tests.operate.at_an_endpoint import RUBRICS, command, config, quorum, reply

HOW = ("--executor", "inprocess")


def test_a_preview_is_read_and_not_paid_for_twice(server: Endpoint, tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Answer:
        if "Is it true?" in json.dumps(body):
            return said(json.dumps({"reason": "[bold]Not\x1b[31m true", "score": 9}))
        return reply(body, number)

    server.script = script
    values = config(server.url)
    shown = " ".join(quorum(*command("preview", tmp_path, values, "-n", "3", *HOW)).split())
    assert "prompt 1 of 3, pocket" in shown and "prompt 3 of 3, pocket" in shown
    assert "candidate 1 desirable final 8.50 ≥ 7 An answer. helpfulness 8: because factuality 9:" in shown
    assert "factuality 9: [bold]Not\\x1b[31m true critic: sound: because" in shown and "\x1b" not in shown
    # Both responses to a prompt are equal, and so is what judges and critic are asked about them.
    assert f" {3 * (2 + 2 + 1)} calls, " in shown
    assert "USD; a run with this configuration does not pay for them again" in shown

    asked = [json.dumps(body) for body in server.asked]
    ended = quorum(*command("run", tmp_path, values, "--to", "gate", "--quiet", *HOW))
    assert "kept: 24 of 24 candidates (100.0 %), 24 desirable and 0 undesirable" in ended
    assert "unread: nothing" in ended and "judge: done" not in ended and ended.replace("\n", "").isprintable()
    twice = {body for body, times in Counter(map(json.dumps, server.asked)).items() if times > 1}
    test_calls = {body for body in asked if "Name a colour" in body or "Reply as briefly" in body}
    assert twice <= test_calls and len(server.asked) > len(asked)

    before = len(server.asked)
    again = quorum(*command("preview", tmp_path, values, "-n", "3", *HOW))
    assert "prompt 3 of 3, pocket" in again and len(server.asked) == before


def test_a_preview_of_nothing_is_refused(tmp_path: Path) -> None:
    told = quorum("preview", "agreement", "-c", "pocket_agreement", "--run-dir", str(tmp_path / "run"), code=2)
    assert "agreement judges no candidates, so there is nothing to preview" in " ".join(told.split())


@pytest.mark.parametrize(
    ("judged", "code", "told"), [("nonsense", 1, "judge failed: "), (None, 2, "nothing was started")]
)
def test_a_preview_that_fails_says_why(
    judged: str | None, code: int, told: str, server: Endpoint, tmp_path: Path
) -> None:
    def script(body: dict[str, Any], number: int) -> Answer:
        if body["model"] == "judge" and judged is None:
            return Answer(401, {"error": {"message": "who?"}})
        if body["model"] == "judge" and "colour" not in json.dumps(body):
            return said(judged)
        return reply(body, number)

    server.script = script
    limits = {"max_error_rate": 0.1, "error_window": 4}
    values = config(server.url, failure=limits, judge={"rubrics": RUBRICS, "asking": {"retries": 0}})
    assert told in quorum(*command("preview", tmp_path, values, *HOW), code=code)
