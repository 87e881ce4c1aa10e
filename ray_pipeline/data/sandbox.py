"""Python code that a model wrote, run in a process of its own: without a network, with limits, in a temporary folder.

The namespaces come from `unshare` (util-linux): no network, and no process that outlives the run. Limits of CPU time,
memory, file size and processes are those of the kernel. This is no strong isolation: docs/roads.md has what is left.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ray_pipeline.constraints.official import CheckersMissing

_NAMESPACES = ("--user", "--net", "--pid", "--ipc", "--fork", "--kill-child")
_FILE_BYTES = 16 << 20
_FILES, _PROCESSES = 64, 64
#: Longest wall time of a run, for code that waits: CPU time decides, so that a busy machine changes no verdict.
_WALL_S, _WALL_TIMES = 30.0, 5.0
_NO_RESULT = "ended without a result (out of time, killed, or an early exit)"
_REMEDY = "run on Linux with util-linux and unprivileged user namespaces, or remove the judge"

#: Runs in the sandbox. The token is written only where the code and then the test came to their ends, so that neither
#: an early exit nor printed text passes.
_RUNNER = """
import json, os, resource, sys
job = json.loads(sys.stdin.buffer.read())
sys.stdin = open(os.devnull)
for name, limit in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
open("started", "w").close()
space = {"__name__": "response"}
try:
    for name in ("code", "test"):
        exec(compile(job[name], name, "exec"), space)
    found = job["token"]
except BaseException as error:
    found = f"{type(error).__name__}: {error}"[:200]
with open("result", "w") as file:
    file.write(found)
    file.flush()
    os._exit(0)
"""


class SandboxMissing(CheckersMissing):
    """Code cannot be run apart here; the message says why, and what to do."""


@functools.cache
def sandbox() -> tuple[str, ...]:
    """The command that runs another one without a network.

    Raises:
        SandboxMissing: namespaces are not permitted here, or `unshare` is not installed.
    """
    program = shutil.which("unshare")
    if program is None:
        raise SandboxMissing(f"unit tests need a sandbox, and the program unshare is not installed; {_REMEDY}")
    command = (program, *_NAMESPACES, "--")
    done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        why = done.stderr.strip() or f"exit code {done.returncode}"
        raise SandboxMissing(
            f"unit tests need a sandbox, and the network cannot be switched off here ({why}); {_REMEDY}"
        )
    return command


def failure(code: str, test: str, cpu_s: int, memory_mb: int) -> str | None:
    """Run code and then a test in the same namespace; None if both ended, else what went wrong.

    Both see the standard library only, an empty environment, and a temporary folder as working folder and HOME.

    Raises:
        SandboxMissing: as `sandbox`.
        OSError: the sandbox did not start.
    """
    command = [*sandbox(), sys.executable, "-I", "-S", "-c", _RUNNER]
    memory, token = memory_mb << 20, secrets.token_hex(16)
    limits = {
        "RLIMIT_CPU": cpu_s,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": _FILE_BYTES,
        "RLIMIT_NOFILE": _FILES,
        "RLIMIT_NPROC": _PROCESSES,
        "RLIMIT_CORE": 0,
    }
    job = json.dumps({"code": code, "test": test, "token": token, "limits": limits}).encode()
    with tempfile.TemporaryDirectory(prefix="quorum-tests-", ignore_cleanup_errors=True) as folder:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command,
                input=job,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "PYTHONHASHSEED": "0"},
                timeout=_WALL_S + _WALL_TIMES * cpu_s,
                check=False,
            )
        if not (Path(folder) / "started").is_file():
            raise OSError("the sandbox of unit tests did not start; run the command again, or use fewer workers")
        try:
            with open(Path(folder) / "result", encoding="utf-8", errors="replace") as file:
                found = file.read(200)
        except OSError:
            return _NO_RESULT
    return None if found == token else found or _NO_RESULT
