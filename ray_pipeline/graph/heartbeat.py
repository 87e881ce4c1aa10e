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

from ray_pipeline.store.files import Folder, StoreError

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
