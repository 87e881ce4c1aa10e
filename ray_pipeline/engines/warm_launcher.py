"""Starts a Python process from a warm server (see ``warm``). Run as a script, with nothing but the standard library.

    python -I -S warm_launcher.py FOLDER PYTHON [ARGUMENT…]

It stays until the process ends, and ends with the same status. Where there is no server, or the environment differs in
what the server's imports have read, it becomes PYTHON with the same arguments.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping

SOCKET, ENVIRONMENT = "socket", "environment"

#: Beginnings of the names of variables that torch, transformers, vLLM and their like read while they are imported.
_READ_AT_IMPORT = (
    *(
        "HF_",
        "HUGGINGFACE_",
        "TRANSFORMERS_",
        "VLLM_LOGGING_",
        "VLLM_CONFIGURE_LOGGING",
        "TORCH",
        "PYTORCH_",
        "CUDA_",
        "MKL_",
        "OPENBLAS_",
    ),
    *("XDG_", "HOME", "PYTHONPATH", "LD_"),
)

#: What the server sets for its imports, as engines do for their cores: no compiler, no waiting threads at work.
OWN = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCHDYNAMO_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def decisive(environment: Mapping[str, str]) -> bytes:
    """The variables that a process must have in common with the server."""
    names = sorted(name for name in environment if name.startswith(_READ_AT_IMPORT) and name not in OWN)
    return json.dumps({name: environment[name] for name in names}).encode()


def open_files() -> list[int]:
    """Numbers of the files that this process has open, as a process that it executes would have them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            continue  # the listing's own
    return sorted(found)


def main() -> None:
    folder, python, *arguments = sys.argv[1:]
    files = open_files()
    try:
        with open(os.path.join(folder, ENVIRONMENT), "rb") as stream:
            if stream.read() != decisive(os.environ):
                raise OSError("another environment")
        server = socket.socket(socket.AF_UNIX)
        server.connect(os.path.join(folder, SOCKET))
        asked = {
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "files": files,
            "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        }
        message = json.dumps(asked).encode()
        socket.send_fds(server, [len(message).to_bytes(8, "big")], files)
        server.sendall(message)
    except OSError:
        os.execv(python, [python, *arguments])
    for file in files[3:]:
        os.close(file)  # the process has them: a pipe closes when it does
    status = server.recv(8)
    if len(status) < 8:  # the server is gone, and all of its processes with it
        os.kill(os.getpid(), signal.SIGKILL)
    code = int.from_bytes(status, "big", signed=True)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
