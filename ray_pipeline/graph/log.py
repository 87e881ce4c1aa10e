"""Lines of a run, on the terminal and in logs/TIMESTAMP.log of a local run folder."""

from __future__ import annotations

import datetime
import logging
import sys

from rich.console import Console

from ray_pipeline.graph.display import Display, ProgressLines
from ray_pipeline.graph.json_log import JsonLines, stage_of
from ray_pipeline.graph.progress import StageProgress
from ray_pipeline.store.errors import not_written
from ray_pipeline.store.files import Folder
from ray_pipeline.store.locations import base_name, make_folder, set_mode
from ray_pipeline.store.outside import shown

logger = logging.getLogger("quorum")


class _LogFile(logging.FileHandler):
    """A log whose disk may be full by now: the stage that cannot write reports it, once and in words."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Lines(logging.Formatter):
    """Lines of any logger, safe for a terminal and without keys."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class RunLog:
    """The log while the `with` block runs.

    Args:
        as_json: JSON lines, on the terminal and in logs/TIMESTAMP.jsonl.
        debug: tracebacks go to the terminal, too; the file always has them.
    """

    def __init__(self, folder: Folder, console: Console, as_json: bool = False, debug: bool = False) -> None:
        self._folder, self._console, self._json, self._debug = folder, console, as_json, debug
        self.display: Display | None = None
        self.stages: list[str] = []
        self._handlers: list[logging.Handler] = []
        self._lines = ProgressLines()

    def __enter__(self) -> RunLog:
        formatter: logging.Formatter = _Lines("%(asctime)s %(name)s %(levelname)s %(message)s")
        if self._json:
            formatter = JsonLines(base_name(self._folder.location))
            stream = logging.StreamHandler(sys.stdout)
            stream.setLevel(logging.DEBUG if self._debug else logging.INFO)
            self._handlers.append(stream)
        if self._folder.is_local:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            name = f"logs/{stamp}.{'jsonl' if self._json else 'log'}"
            try:
                make_folder(self._folder.path("logs"))
                self._handlers.append(_LogFile(self._folder.path(name), encoding="utf-8"))
                set_mode(self._folder.path(name))
            except OSError as error:
                raise not_written(self._folder.uri("logs"), error) from error
        for handler in self._handlers:
            handler.setFormatter(formatter)
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()

    def say(self, line: str, shard: int | None = None) -> None:
        line = shown(" ".join(line.splitlines()))
        self._write(logging.INFO, line, shard)
        self._show(line)

    def trace(self, text: str, shard: int | None = None) -> None:
        """A traceback: to the file, and with --debug to the terminal."""
        text = shown(text)
        self._write(logging.DEBUG, text, shard)
        if self._debug:
            self._show(text)

    def progress(self, stages: list[StageProgress]) -> None:
        """Write lines about the stages at work when they are due, in a JSON log with their counters. On the terminal
        the display shows them."""
        for stage, line in self._lines.due(stages):
            logger.info(line, extra={"stage": stage.name, "data": stage.plain()})

    def _write(self, level: int, line: str, shard: int | None) -> None:
        logger.log(level, line, extra={"stage": stage_of(line, self.stages), "shard": shard})

    def _show(self, line: str) -> None:
        if self._json:
            return
        if self.display is not None:
            self.display.say(line)
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
