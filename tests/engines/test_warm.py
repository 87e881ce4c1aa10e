"""Processes that are forked from a warm server behave like new ones."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_pipeline.engines import warm_launcher
from ray_pipeline.engines.warm import WarmPython, warm_python

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="the launcher hands files over as Linux does"),
]

LOADED = "import sys; print('torch' in sys.modules, 'ray' in sys.modules)"


@pytest.fixture(scope="module")
def warm() -> Iterator[str]:
    with WarmPython() as server:
        if server.python is None:
            pytest.skip("this is not the CPU build of vLLM")
        yield server.python


def run(python: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *arguments], capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def test_it_has_arguments_environment_folder_and_files_of_its_own(warm: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], os.environ['QUORUM_TEST'], os.getcwd())\n"
        "    print(sys.stdin.read(), os.read(int(sys.argv[1]), 9))\n"
        "    print('aside', file=sys.stderr)\n"
    )
    reading, writing = os.pipe()
    os.write(writing, b"by a pipe")
    environment = {**os.environ, "QUORUM_TEST": "here"}
    done = run(
        warm, str(script), str(reading), "two words",
        input="typed", env=environment, cwd=tmp_path, pass_fds=[reading],
    )  # fmt: skip
    assert done.stdout == f"['{reading}', 'two words'] here {tmp_path}\ntyped b'by a pipe'\n"
    assert done.stderr == "aside\n"
    os.close(writing)
    os.close(reading)


def test_it_has_imported_torch_and_not_ray(warm: str) -> None:
    assert run(warm, "-c", LOADED).stdout == "True False\n"
    assert run(sys.executable, "-c", LOADED).stdout == "False False\n"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no such file')", 1, "no such file\n"),
        ("import atexit; atexit.register(print, 'last words')", 0, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_it_ends_as_its_program_does(warm: str, code: str, status: int, said: str) -> None:
    done = run(warm, "-c", code)
    assert (done.returncode, done.stderr) == (status, said)
    assert done.stdout == ("last words\n" if "atexit" in code else "")


def test_an_error_is_shown(warm: str) -> None:
    done = run(warm, "-c", "1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr


def test_an_environment_that_imports_have_read_otherwise_gets_a_new_python(warm: str) -> None:
    elsewhere = {**os.environ, "HF_HOME": "/elsewhere"}
    assert run(warm, "-c", LOADED, env=elsewhere).stdout == "False False\n"
    assert warm_launcher.decisive(elsewhere) != warm_launcher.decisive(os.environ)
    assert warm_launcher.decisive({**os.environ, **warm_launcher.OWN}) == warm_launcher.decisive(os.environ)


def test_nothing_outlives_the_server() -> None:
    waiting = "import time; print('begun', flush=True); time.sleep(600)"
    with WarmPython() as server:
        if server.python is None:
            pytest.skip("this is not the CPU build of vLLM")
        python = server.python
        process = subprocess.Popen([python, "-c", waiting], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        begun = time.monotonic()
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert process.stdout.read() == b""
    assert time.monotonic() - begun < 10
    assert not Path(python).exists()


def test_it_ends_with_its_launcher(warm: str) -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen([warm, "-c", program], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        pid = int(launcher.stdout.readline())
        assert pid != launcher.pid and Path(f"/proc/{pid}").exists()
        launcher.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_runs_is_used(warm: str) -> None:
    with warm_python() as first, warm_python(wanted=False) as second:
        assert first == second == warm
