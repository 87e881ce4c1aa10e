"""Warm workers: Python processes that start with torch, transformers, TRL and vLLM imported already.

Every Ray worker that trains or holds an engine spends 6 to 10 s of CPU time on imports, and a run without a GPU has
little else to wait for. So a server (``warm_server``) imports them once, and workers are forked from it:

    runtime_env = {"py_executable": WarmPython.python}

Ray then starts workers by a small launcher (``warm_launcher``), which hands its arguments, environment and open files
to the server; the process that the server forks runs them as Python would. Ray itself is imported after the fork: its
settings are read from the environment of each worker. Where the server is gone, or the environment would have changed
what was imported, the launcher becomes an ordinary Python.

On the CPU build of vLLM and on Linux only: CUDA does not survive a fork, and there the model takes most of a start.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ray_pipeline.engines import warm_launcher
from ray_pipeline.engines.core_server import WARM_PYTHON, is_cpu_build
from ray_pipeline.engines.vllm_processes import prepare_environment


class WarmPython:
    """The server, and the launcher that starts a Python from it. It imports in the background; who comes earlier waits.

    The server takes about 0.7 GB, most of which its processes share. It and they end with this process.

    Meanwhile the environment names the launcher, also to the processes that are started: clusters that they start, and
    engines of this process, use the same server.

    Attributes:
        python: path of the launcher; None where there is no server.
    """

    python: str | None = None

    def __init__(self) -> None:
        if sys.platform != "linux" or not is_cpu_build():
            return
        self._folder = tempfile.mkdtemp(prefix="quorum-warm-")  # only this user may enter it, and so the socket
        prepare_environment()  # what is imported reads it, here as in a process that is not warm
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.join(self._folder, warm_launcher.SOCKET))
            listener.listen(128)
            environment = Path(self._folder, warm_launcher.ENVIRONMENT)
            environment.write_bytes(warm_launcher.decisive(os.environ))
            self._server: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-m", "ray_pipeline.engines.warm_server", str(listener.fileno())],
                stdin=subprocess.PIPE,  # closes when this process ends, in whatever way
                stdout=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                env={**os.environ, **warm_launcher.OWN},
                start_new_session=True,  # a signal to this process's group must not end it
            )
        launcher = Path(self._folder, "python")
        words = [sys.executable, "-I", "-S", warm_launcher.__file__, self._folder, sys.executable]
        launcher.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        launcher.chmod(0o700)
        self._before = os.environ.get(WARM_PYTHON)
        self.python = os.environ[WARM_PYTHON] = str(launcher)

    def close(self) -> None:
        """End the server and the processes that were forked from it."""
        if self.python is None:
            return
        self.python = None
        del os.environ[WARM_PYTHON]
        if self._before is not None:
            os.environ[WARM_PYTHON] = self._before
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(timeout=10.0)
        except subprocess.TimeoutExpired:  # it imports
            self._server.kill()
            self._server.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def warm_python(wanted: bool = True) -> Iterator[str | None]:
    """The launcher of the server that runs already, or of one that lives with the block; None where there is none.

    Args:
        wanted: start one if none runs.
    """
    running = os.environ.get(WARM_PYTHON)
    if running or not wanted:
        yield running
    else:
        with WarmPython() as warm:
            yield warm.python
