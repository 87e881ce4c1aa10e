"""A run's log as JSON lines: one object a line, with run, stage and shard where they are known."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Iterable
from typing import Any

from ray_pipeline.store.secrets import redacted


class JsonLines(logging.Formatter):
    """Formats a record with the attributes `stage`, `shard` and `data`, where it has them.

    Args:
        run: name of the run folder.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": moment, "level": record.levelname, "logger": record.name, "run": self._run}
        for name in ("stage", "shard", "data"):
            value = getattr(record, name, None)
            if value is not None:
                line[name] = value
        line["message"] = record.getMessage()
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(redacted(line), ensure_ascii=False, default=str)


def stage_of(line: str, stages: Iterable[str]) -> str | None:
    """The stage that a line of the run's log is about: what stands before its first colon, where that is a stage."""
    name = line.split(": ", 1)[0]
    return name if name in set(stages) else None
