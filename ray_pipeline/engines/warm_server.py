"""The process that warm workers are forked from (see ``warm``).

    python -m ray_pipeline.engines.warm_server SOCKET_NUMBER

It ends when its standard input does, which is its owner's end, and every process that was forked from it with it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from typing import Any

from ray_pipeline.engines.core_server import CORE_MODULES, die_with_parent

#: What Ray workers of a run import. A name that is not there is passed over.
_MODULES = (
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pydantic",
    "torch",
    "transformers",
    "datasets",
    "peft",
    "trl",
    "ray_pipeline.training.trainer",
    "vllm.engine.arg_utils",
    "vllm.v1.engine.async_llm",
    *CORE_MODULES,
)

_FIRST_FREE = 400  # file numbers from here on are free while files move to their places


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()  # imports leave hardly any garbage, and looking for it takes a fifth of their time
    # Ray would read the environment of this process, and a worker has another one. vLLM imports it if it can, for
    # engines on several nodes.
    sys.modules["ray"] = None  # type: ignore[assignment]
    for name in _MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    del sys.modules["ray"]
    gc.freeze()  # never garbage; and a collection in a child would copy all pages
    code = 0
    try:
        if (asked := _serve(listener)) is not None:
            _run(asked)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # As at the end of Python, but for taking every module apart: that takes half a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _serve(listener: socket.socket) -> dict[str, Any] | None:
    """Fork a child for each launcher. Returns in the child with what it is to run; in this process at the owner's end,
    with None."""
    children: dict[int, socket.socket] = {}
    ended_out, ended_in = socket.socketpair()
    ended_in.setblocking(False)
    ended_out.setblocking(False)
    signal.set_wakeup_fd(ended_in.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        for file in (listener, ended_out, sys.stdin):
            selector.register(file, selectors.EVENT_READ)
        while True:
            keys = [key for key, _ in selector.select()]
            ready = [key.fileobj for key in keys]
            if sys.stdin in ready:
                return None
            if ended_out in ready:
                with contextlib.suppress(BlockingIOError):
                    ended_out.recv(4096)
                _tell_ends(children, selector)
            for child in (key.data for key in keys if key.data in children):
                # Its launcher was killed, as Ray kills the children of an actor: it goes with it.
                selector.unregister(children[child])
                os.kill(child, signal.SIGKILL)
            if listener in ready:
                launcher, _ = listener.accept()
                asked = _receive(launcher)
                if asked is None:
                    launcher.close()
                    continue
                child = os.fork()
                if child == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (listener, launcher, ended_out, ended_in, *children.values()):
                        other.close()
                    return asked
                for file in asked["received"]:
                    os.close(file)
                children[child] = launcher
                selector.register(launcher, selectors.EVENT_READ, child)


def _receive(launcher: socket.socket) -> dict[str, Any] | None:
    """What a launcher asks for, with its open files in the order of `files`; None if it ended before it had asked."""
    head, received, _, _ = socket.recv_fds(launcher, 8, 253)
    size, message = int.from_bytes(head, "big"), b""
    while len(message) < size and (more := launcher.recv(size - len(message))):
        message += more
    if not message or len(message) < size:
        for file in received:
            os.close(file)
        return None
    return {**json.loads(message), "received": received}


def _tell_ends(children: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Pass the status of children that have ended on to their launchers."""
    with contextlib.suppress(ChildProcessError):
        while True:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            if launcher := children.pop(child, None):
                with contextlib.suppress(KeyError):  # unregistered already
                    selector.unregister(launcher)
                with contextlib.suppress(OSError), launcher:  # a launcher may have been killed
                    launcher.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))


def _run(asked: dict[str, Any]) -> None:
    """Become the process that was asked for: `python SCRIPT …`, `python -m MODULE …` or `python -c CODE …`."""
    arguments: list[str] = asked["arguments"]
    while arguments[0].startswith("-") and arguments[0] not in ("-c", "-m"):
        del arguments[0]  # flags of the interpreter, which runs already
    if arguments[0] == "-c":  # Ray's workers take names of their own, by a library that finds no place after this one
        with contextlib.suppress(ImportError):
            import setproctitle  # a requirement of vLLM; it finds its place by the environment as it was at the start

            setproctitle.setproctitle(" ".join(["python", *arguments]))
    die_with_parent()
    os.setsid()  # Ray ends a worker with its whole process group
    moved: list[int] = []
    for file in asked["received"]:  # out of the way first
        moved.append(os.dup2(file, _FIRST_FREE + len(moved)))
        os.close(file)
    for file, place in zip(moved, asked["files"], strict=True):
        os.dup2(file, place)
        os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, asked["niceness"])
    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(max(1, int(threads)))  # the library has read it when it was loaded
    import numpy

    numpy.random.seed()  # not the server's state in every child; Python's own generator sees to it by itself
    gc.enable()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = ""
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
