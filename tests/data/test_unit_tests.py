"""The checker that runs code: what passes, what a sandbox refuses, and where there is none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ray_pipeline.data.unit_tests  # noqa: F401 (registers the checker)
from ray_pipeline.data.checkers import Checked, check_checker, load_checker
from ray_pipeline.data.sandbox import SandboxMissing, failure, sandbox

ADD = "def add(a, b):\n    return a + b\n"


def permitted() -> bool:
    try:
        sandbox()
    except SandboxMissing:
        return False
    return True


needs_sandbox = pytest.mark.skipif(not permitted(), reason="no user namespaces here")


def checked(response: str, tests: Any, **options: Any) -> Checked | None:
    check = load_checker("unit_tests", {"execute": True, **options})
    return check([], response, json.dumps({"tests": tests} if tests is not None else {}))


@needs_sandbox
@pytest.mark.parametrize(
    ("response", "tests", "share", "reason"),
    [
        (ADD, "assert add(1, 2) == 3", 1.0, "1 of 1 tests pass"),
        (f"Here it is:\n```python\n{ADD}```\nDone.", ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], 1.0, "2 of 2"),
        (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4"], 0.5, "1 of 2 tests pass; test 2: AssertionError"),
        ("no code at all", ["assert True"], 0.0, "test 1: SyntaxError"),
        ("import os\nos._exit(0)", "assert False", 0.0, "ended without a result"),
        ("import sys\nsys.exit(0)", "assert False", 0.0, "SystemExit: 0"),
        ("print('ok')\nopen('result', 'w').write('passed')", "assert False", 0.0, "AssertionError"),
        ("while True: pass", "pass", 0.0, "out of time"),
        ("x = bytearray(1 << 30)", "pass", 0.0, "MemoryError"),
        ("open('big', 'wb').write(bytes(32 << 20))", "pass", 0.0, ""),
    ],
)
def test_the_score_is_the_share_of_tests_that_pass(response: str, tests: Any, share: float, reason: str) -> None:
    found = checked(response, tests, cpu_s=2)
    assert found is not None and found.share == share and reason in found.reason


@pytest.fixture
def server() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@needs_sandbox
def test_there_is_no_network(server: int) -> None:
    connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server}), 1).close()"
    exec(compile(connect, "here", "exec"), {})  # it works outside
    assert "Network is unreachable" in (failure(connect, "", 10, 256) or "")


@needs_sandbox
def test_nothing_outlives_a_run_and_no_variable_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert (
        failure(
            "import os\nassert set(os.environ) <= {'HOME', 'TMPDIR', 'PATH', 'PYTHONHASHSEED', 'LC_CTYPE'}", "", 5, 256
        )
        is None
    )
    mark = tmp_path / "mark"
    forks = f"import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    open({str(mark)!r}, 'w').close()\n"
    assert failure(forks, "assert True", 10, 256) is None
    time.sleep(1.5)
    assert not mark.exists()


@needs_sandbox
def test_the_working_folder_is_temporary() -> None:
    told = failure("import os\nraise ValueError(os.getcwd())", "", 10, 256)
    assert told is not None and "quorum-tests-" in told
    assert not os.path.exists(told.removeprefix("ValueError: "))


def test_it_is_off_unless_asked() -> None:
    for options in ({}, {"execute": False}):
        with pytest.raises(ValueError, match=r"unit_tests: options: it runs code that models wrote; .*execute: true"):
            load_checker("unit_tests", options)


def test_a_prompt_without_tests_is_undecided_and_wrong_ones_are_named() -> None:
    assert checked(ADD, None) is None and checked(ADD, []) is None
    with pytest.raises(ValueError, match="tests of a prompt must be Python code"):
        checked(ADD, [1])


def test_without_a_sandbox_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    false = shutil.which("false")
    try:
        for program, message in ((None, "unshare is not installed"), (false, "cannot be switched off")):
            sandbox.cache_clear()
            monkeypatch.setattr(shutil, "which", lambda name, program=program: program)
            with pytest.raises(SandboxMissing, match=message):
                check_checker("unit_tests", {"execute": True})
            with pytest.raises(SandboxMissing, match=message):
                checked(ADD, "assert add(1, 2) == 3")
    finally:
        sandbox.cache_clear()
