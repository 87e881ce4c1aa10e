"""Ends the processes of an engine whose owner is gone. Run as a script, with nothing but the standard library.

    python -I -S reaper.py MARK

vLLM's engine core is a child of the process that made it and does not always notice when that process is killed: it
would hold its memory, or its GPU, for ever. The owner starts this script with a pipe as its standard input and a MARK
in the environment that the engine's processes inherit. The pipe closes when the owner ends, in whatever way, and then
every process that carries the mark is killed. The owner writes ``done`` before it closes an engine itself.

Linux only: elsewhere there is no /proc, and the script ends at once.
"""

import os
import select
import signal
import sys
import time

POLL = 1.0  # seconds between two looks at the owner
GRACE = 1.0  # seconds for an engine that is ending by itself
ROUNDS = 20  # a process may start another one while it is being looked for


def marked(entry: bytes) -> list[int]:
    """Process ids whose environment holds ``entry`` (``NAME=value``), this process left out."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as stream:
                    if entry in stream.read().split(b"\0"):
                        found.append(int(name))
            except OSError:
                continue  # another user's process, or one that has just ended
    return found


def kill_marked(entry: bytes) -> None:
    """SIGKILL every process that carries ``entry``, until there is none."""
    for _ in range(ROUNDS):
        processes = marked(entry)
        if not processes:
            return
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.1)


def main() -> None:
    entry = sys.argv[1].encode()
    if not os.path.isdir("/proc/self"):
        return
    # Ctrl-C goes to the whole terminal group: the owner decides, and this process waits for its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    owner = os.getppid()
    # A process forked off the owner would hold the pipe open after the owner's end, so its id is watched as well.
    while os.getppid() == owner:
        if select.select([sys.stdin], [], [], POLL)[0]:
            if os.read(sys.stdin.fileno(), 4) == b"done":
                return
            break
    time.sleep(GRACE)
    kill_marked(entry)


if __name__ == "__main__":
    main()
