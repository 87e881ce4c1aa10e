"""One writer a run folder: a heartbeat file that works across hosts.

Neither process ids nor clocks of two hosts are compared. The owner writes a number that grows; a newcomer watches the
file for a few beats of its *own* clock. A file that changes has a living owner; one that stands still has none and
may be taken. An owner whose name is no longer in the file has been replaced and must stop.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable

from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder

#: Seconds between two beats, and how many of them a newcomer waits for a sign of life.
BEAT_SECONDS = 2.0
BEATS_WAITED = 5

_NAME = "heartbeat.json"


class RunBusy(RuntimeError):
    """Another living process writes to the run folder."""


class Heartbeat:
    """Holds a run folder while the `with` block runs.

    Raises:
        RunBusy: somebody else lives there.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        beat_seconds: float = BEAT_SECONDS,
        on_loss: Callable[[], None] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.owner = uuid.uuid4().hex
        self.lost = False
        self._folder = folder
        self._beat = beat_seconds
        self._on_loss = on_loss
        self._say = say
        self._count = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        seen = self._read()
        if seen is not None:
            wait = self._beat * BEATS_WAITED
            self._say(
                f"the run folder has a heartbeat file; watching it for {wait:.0f} s to see whether its owner lives"
            )
            end = time.monotonic() + wait
            while time.monotonic() < end:
                time.sleep(self._beat / 4)
                now = self._read()
                if now is None:  # The owner ended in good order while we watched.
                    break
                if now != seen:
                    raise RunBusy(
                        f"another process is running in {self._folder.location} (its heartbeat goes on). "
                        "Wait for it, end it, or use another --run-dir"
                    )
            else:
                self._say("its owner is gone; taking the run over")
        self._write()
        # Two newcomers may have found no file, or judged the same one dead: the later write wins, and both look again.
        time.sleep(self._beat if seen is not None else self._beat / 4)
        if not self._mine():
            raise RunBusy(f"another process took {self._folder.location} at the same moment; leave it to that one")
        self._thread = threading.Thread(target=self._run, name="quorum-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        with contextlib.suppress(OSError):  # A file that stays behind costs the next run a few beats, no more.
            if not self.lost and self._mine():
                self._folder.delete(_NAME)

    def _run(self) -> None:
        told = ""
        while not self._stop.wait(self._beat):
            try:
                mine = self._mine()
                if mine:
                    self._write()
            except Exception as error:  # A storage hiccup is no reason to end a run; a newcomer decides by silence.
                if str(error) != told:
                    told = str(error)
                    self._say(f"heartbeat: {told}")
                continue
            if not mine:
                self.lost = True
                if self._on_loss is not None:
                    self._on_loss()
                return

    def _read(self) -> object:
        try:
            return self._folder.read_json(_NAME)
        except FileNotFoundError:
            return None
        except StoreError:
            return "unreadable"

    def _mine(self) -> bool:
        content = self._read()
        return isinstance(content, dict) and content.get("owner") == self.owner

    def _write(self) -> None:
        self._count += 1
        self._folder.write_json(_NAME, {"owner": self.owner, "beat": self._count})


class LogUse:
    """Marks a call log as used while the `with` block runs, and reports at its start that another run uses it.

    Several runs may share a call log, but a shard reads it only when it begins: a call that two runs make at the same
    time is made, and paid for, twice.

    Args:
        calls: folder of the call log.
        run: location of the run folder. Only this process uses it, so another mark of the same run was left by a
            process that was killed.
    """

    def __init__(self, calls: Folder, run: str, *, beat_seconds: float, say: Callable[[str], None]) -> None:
        self._calls, self._run, self._beat, self._say = calls, run, beat_seconds, say
        self._name = f"running-{uuid.uuid4().hex[:12]}.json"
        self._count, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._beat_forever, name="quorum-log-use", daemon=True)

    def __enter__(self) -> LogUse:
        self._mark()  # before the look: of two runs that start together at least one sees the other
        others = self._others()
        self._thread.start()
        if living := self._living(others):
            self._say(
                f"{' and '.join(living)} is running on the same call log ({self._calls.location}): a call that both "
                "make at the same time is paid for twice. To pay once, interrupt this run and rerun the same command "
                "when the other has ended"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)
        with contextlib.suppress(OSError):
            self._calls.delete(self._name)

    def _living(self, others: dict[str, dict[str, object]]) -> list[str]:
        """The runs whose marks change within a few beats; marks that stand still are deleted."""
        living: set[str] = set()
        end = time.monotonic() + self._beat * BEATS_WAITED
        while others and time.monotonic() < end:
            time.sleep(self._beat / 4)
            now = self._others()
            living |= {str(mark["run"]) for name, mark in others.items() if name in now and now[name] != mark}
            others = {name: mark for name, mark in others.items() if now.get(name) == mark}
        for name in others:
            with contextlib.suppress(OSError):
                self._calls.delete(name)
        return sorted(living)

    def _others(self) -> dict[str, dict[str, object]]:
        marks: dict[str, dict[str, object]] = {}
        for name in self._calls.names(".json"):
            if name.startswith("running-") and name != self._name:
                with contextlib.suppress(FileNotFoundError, StoreError):
                    mark = self._calls.read_json(name)
                    if isinstance(mark, dict) and mark.get("run") != self._run:
                        marks[name] = mark
        return marks

    def _beat_forever(self) -> None:
        while not self._ended.wait(self._beat):
            self._mark()

    def _mark(self) -> None:
        self._count += 1
        with contextlib.suppress(OSError):  # a log that cannot be written is reported where replies are written
            self._calls.write_json(self._name, {"run": self._run, "beat": self._count})
