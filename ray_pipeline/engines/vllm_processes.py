"""The processes of a vLLM engine: their environment, and their end.

No process outlives its owner: ``close()`` and the normal end of the interpreter end them, and a small process beside
each engine (``reaper``) kills what is left if the owner is killed. ``ray.kill`` and Ray Data's end of an actor run no
``atexit`` and no destructor, hence the reaper.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.engines import reaper

if TYPE_CHECKING:
    from ray_pipeline.engines.core_server import CoreServer

_CLOSE_SECONDS = 2.0  # the core frees its memory within one second and takes five more to end: then it is killed


class Reaper:
    """The process that ends an engine's processes when their owner is killed (see ``reaper``).

    Attributes:
        name, value: the mark, an environment variable that the engine's processes inherit.
    """

    def __init__(self) -> None:
        self.name, self.value = "QUORUM_ENGINE", uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        if sys.platform == "linux":
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(reaper.__file__)), self._entry],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a signal to the owner's group must not end it
                env={name: value for name, value in os.environ.items() if name != self.name},  # another one's mark
            )

    @property
    def _entry(self) -> str:
        return f"{self.name}={self.value}"

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Processes that are started meanwhile carry the mark."""
        before = os.environ.get(self.name)
        os.environ[self.name] = self.value
        try:
            yield
        finally:
            del os.environ[self.name]
            if before is not None:
                os.environ[self.name] = before

    def children(self) -> list[multiprocessing.process.BaseProcess]:
        """The engine's processes that are children of this process, which has to wait for them."""
        if self._process is None:
            return []
        marked = reaper.marked(self._entry.encode())
        return [child for child in multiprocessing.active_children() if child.pid in marked]

    def release(self) -> None:
        """Kill what is left of the engine, and end the reaper."""
        if self._process is None or self._process.stdin is None:
            return
        reaper.kill_marked(self._entry.encode())
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"done")
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a busy machine may end it later
            self._process.wait(timeout=5.0)
        self._process = None


def prepare_environment() -> None:
    """Set defaults of the variables that vLLM reads; the user's own values are kept."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings list its own choices, a dozen lines per engine
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for the command's own output
        "TOKENIZERS_PARALLELISM": "false",  # threads do not help with one prompt at a time
        # With binding, the threads of two engines would share one core and leave another idle.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def child_environment(owner: Reaper, *, cpu: bool) -> Iterator[None]:
    """The environment for starting an engine's processes; restored afterwards.

    Processes that the owner starts later (a Ray cluster, for example) must not inherit the reaper's mark, and vLLM
    leaves variables behind, LD_PRELOAD and LOCAL_WORLD_SIZE among them, that would affect a training run in this
    process.
    """
    # Python's helper for shared memory belongs to the owner, not to the engine: start it before the mark is set.
    resource_tracker.ensure_running()
    before = dict(os.environ)
    os.environ[owner.name] = owner.value
    if cpu:
        # Samplers are compiled even in eager mode: 7 s for the first log-probabilities, and a C++ compiler is needed.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # Ray sets the number of threads to the CPUs that an actor reserves. Elsewhere one core is left to this
        # process, and threads must not spin on it while they wait.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            if not name.startswith("VLLM_"):
                del os.environ[name]
        os.environ.update(before)


def end_processes(engine: Any, owner: Reaper | None, server: CoreServer | None) -> None:
    """End the processes of an engine, whatever has been started of it."""
    children = owner.children() if owner is not None else []
    try:
        if engine is not None:
            _shut_down(engine)
    finally:
        if owner is not None:
            owner.release()
        for child in children:
            child.join(timeout=5.0)  # otherwise killed children stay behind as zombies
        if server is not None:
            server.release()


def _shut_down(engine: Any) -> None:
    import psutil  # a requirement of vLLM

    try:
        engine.shutdown(timeout=_CLOSE_SECONDS)
    except psutil.NoSuchProcess:
        # The core ended by itself just when vLLM was about to kill it. vLLM has then skipped closing its sockets, and
        # the next collection of garbage would wait for them for ever.
        engine.engine_core.resources()
