"""What was spent, summed over everybody who shares a call log."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from ray_pipeline.engines import account as module
from ray_pipeline.engines.account import Account, Prices, Used
from ray_pipeline.engines.base import Completion
from ray_pipeline.store.files import Folder

REPLY = Completion("x", "stop", 10, 5, 4)


@pytest.fixture(autouse=True)
def _look_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)


def test_engines_of_one_model_see_each_other_and_no_others(tmp_path: Path) -> None:
    root = Folder(str(tmp_path))

    async def go() -> None:
        first, second, other = Account("https://a/v1", "m"), Account("https://a/v1", "m"), Account("https://b/v1", "m")
        for _ in range(3):
            first.own.count(REPLY)
        other.own.count(REPLY)
        for account in (first, other, second):
            await account.settle(root)
        assert second.total() == Used(3, 30, 12, 15) and other.total() == Used(1, 10, 4, 5)
        second.own.count(REPLY)
        assert second.total().calls == 4 and first.total().calls == 3
        await second.settle(root)
        await first.settle(root)
        assert first.total() == second.total() == Used(4, 40, 16, 20)
        # A resumed run is another engine.
        later = Account("https://a/v1", "m")
        await later.settle(root)
        assert later.total() == first.total() and later.own == Used()
        assert later.total().price(Prices(input=1, cached_input=0.5, output=2)) == pytest.approx((24 + 8 + 40) / 1e6)

    asyncio.run(go())


def test_nothing_is_written_where_nothing_was_spent(tmp_path: Path) -> None:
    account = Account("https://a/v1", "m")
    asyncio.run(account.settle(Folder(str(tmp_path))))
    assert list(tmp_path.rglob("*")) == []


def test_a_file_that_says_nothing_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> Used:
        root, first = Folder(str(tmp_path)), Account("https://a/v1", "m")
        first.own.count(REPLY)
        await first.settle(root)
        [folder] = tmp_path.glob("spent-*")
        for name, text in {
            "torn": '{"calls": 1',
            "other": '{"calls": 1}',
            "list": "[]",
            "words": '{"calls": "x"}',
            "negative": '{"calls": 1, "prompt_tokens": -1000000, "cached_tokens": 0, "completion_tokens": 1}',
            "endless": '{"calls": 1, "prompt_tokens": Infinity, "cached_tokens": 0, "completion_tokens": 1}',
        }.items():
            (folder / f"{name}.json").write_text(text)
        second = Account("https://a/v1", "m")
        await second.settle(root)
        second.own.count(REPLY)
        await second.settle(root)  # it looks again
        total = second.total()
        assert second.own == Used(1, 10, 4, 5)
        return total

    caplog.set_level(logging.WARNING)
    assert asyncio.run(go()) == Used(2, 20, 8, 10)
    assert all(f"{name}.json" in caplog.text for name in ("torn", "other", "list", "words", "negative", "endless"))
    assert len(caplog.records) == 6
