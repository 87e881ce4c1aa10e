"""What `faults.py` does to a run, and the places in which that does no harm to anything else on the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.dags.conftest import Quorum, descendants

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run's processes are.

    Attributes:
        env: variables of the run's environment.
        prefix: what is put before its command.
        mend: what the user does before the same command is given again.
    """

    env: dict[str, str] = dataclasses.field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    mend: Callable[[], object] = lambda: None


@contextlib.contextmanager
def anywhere() -> Iterator[Place]:
    yield Place()


@contextlib.contextmanager
def small_temporary_folder() -> Iterator[Place]:
    """A disk of its own for Ray's temporary files; the user makes room before the run is resumed."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "none", folder], check=True)
        try:
            yield Place({"RAY_TMPDIR": folder}, mend=lambda: Path(folder, FILLER).unlink())
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


FILLER = "filler"


def fill_temporary_folder(run: Quorum) -> None:
    """Leave no byte on the disk of Ray's temporary files."""
    folder = Path(psutil.Process(run.process.pid).environ()["RAY_TMPDIR"])
    with (folder / FILLER).open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()


#: Run by every Python process of the run when it starts.
_CLOCK = """
import os, time

wall, wall_ns, flag, looked = time.time, time.time_ns, os.environ["FAULT_CLOCK"], [0.0, False]


def back():
    if not looked[1] and time.monotonic() - looked[0] > 0.1:
        looked[:] = time.monotonic(), os.path.exists(flag)
    return 3600 if looked[1] else 0


def now():
    return wall() - back()


def now_ns():
    return wall_ns() - back() * 10**9


for function, name in ((now, "time"), (now_ns, "time_ns")):
    # Pickled by name, as the real ones.
    function.__module__, function.__name__, function.__qualname__ = "time", name, name
    setattr(time, name, function)
"""


@contextlib.contextmanager
def adjustable_clock() -> Iterator[Place]:
    """The clock of the run's Python processes (`time.time`; not the monotonic one) can be set back. The kernel's, and
    so those of files and of Ray's own binaries, go on."""
    with tempfile.TemporaryDirectory(prefix="clock-") as folder:
        Path(folder, "sitecustomize.py").write_text(_CLOCK)
        yield Place({"PYTHONPATH": f"{folder}:{ROOT}", "FAULT_CLOCK": str(Path(folder, "back"))})


def set_clock_back(run: Quorum) -> None:
    """Set the clock back by an hour."""
    Path(psutil.Process(run.process.pid).environ()["FAULT_CLOCK"]).touch()


@contextlib.contextmanager
def adjustable_memory() -> Iterator[Place]:
    """What the run's processes read as the machine's memory can be changed: a file over their /proc/meminfo, in a mount
    namespace of their own."""
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        file = Path(folder, "meminfo")
        file.write_text(Path("/proc/meminfo").read_text())
        script = 'mount --bind "$FAULT_MEMORY" /proc/meminfo && exec "$@"'
        prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
        yield Place({"FAULT_MEMORY": str(file)}, prefix)


def use_memory_up(run: Quorum) -> None:
    """Show 1 % of the memory as available until Ray's memory monitor has killed workers. It acts below 5 %; at 4.9 % it
    kills as many."""
    file = Path(psutil.Process(run.process.pid).environ()["FAULT_MEMORY"])
    before, workers = file.read_text(), _workers(run)
    amounts = dict(line.split(":", 1) for line in before.splitlines())
    left = int(amounts["MemTotal"].split()[0]) // 100
    amounts |= {"MemAvailable": f"{left} kB", **dict.fromkeys(("MemFree", "Buffers", "Cached"), "0 kB")}
    end = time.monotonic() + 60
    file.write_text("".join(f"{name}: {amount}\n" for name, amount in amounts.items()))
    try:
        while workers <= _workers(run):
            assert time.monotonic() < end, "the memory monitor killed nothing in a minute"
            time.sleep(0.01)
    finally:
        file.write_text(before)


def _workers(run: Quorum) -> set[int]:
    """Ids of Ray's worker processes that are at work."""
    found = set()
    for process in descendants(run.process.pid):
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline()[:1])
            if process.status() != psutil.STATUS_ZOMBIE and "ray::" in name and "IDLE" not in name:
                found.add(process.pid)
    return found


def kill(*names: str) -> Callable[[Quorum], None]:
    """Kill the first process of the run whose name has one of the words."""

    def harm(run: Quorum) -> None:
        for process in descendants(run.process.pid):
            with contextlib.suppress(psutil.Error):
                if any(name in " ".join(process.cmdline()[:1]) for name in names):
                    process.kill()
                    return
        raise AssertionError(f"no process is named {' or '.join(names)}")

    return harm


def stop_all(run: Quorum) -> None:
    """Stop every process of the run for a minute (SIGSTOP)."""
    family = [psutil.Process(run.process.pid), *descendants(run.process.pid)]
    for send in ("suspend", "resume"):
        for process in family:
            with contextlib.suppress(psutil.Error):
                getattr(process, send)()
        if send == "suspend":
            time.sleep(60)


def few_files(run: Quorum) -> None:
    """Allow the driver 256 open files from now on, and whatever it starts as well."""
    resource.prlimit(run.process.pid, resource.RLIMIT_NOFILE, (256, 256))


def kill_driver(run: Quorum) -> None:
    """Kill the command itself (SIGKILL)."""
    run.process.kill()
