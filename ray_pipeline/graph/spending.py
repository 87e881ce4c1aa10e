"""What a run has cost so far, over all its sessions, and the limit at which it ends in good order.

Money is what endpoints ask for their replies, plus time of devices times a price that the user gives. A device is a
GPU that an actor holds, idle or not; an engine or a training worker without a GPU counts as one.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray_pipeline.engines.usage import Usage
from ray_pipeline.store.files import Folder

logger = logging.getLogger("quorum.spending")

_NAME = "spent.json"
_WRITE_SECONDS = 2.0


def _stored(value: Any) -> Usage:
    return Usage(device_seconds=float(value["device_seconds"]), cost=float(value["cost"]))


@dataclasses.dataclass(frozen=True)
class Budget:
    """The limit of a run.

    Attributes:
        max_cost: in `currency`; None only counts.
        device_hour: price of one device for an hour; None: only what endpoints ask for counts as money.
        workers: stage → devices that it holds all the time (training), for stages whose actors do not report.
    """

    max_cost: float | None = None
    device_hour: float | None = None
    currency: str = "USD"
    workers: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Spending:
    """Counts what a session spends on top of what `spent.json` of the run folder says of earlier ones.

    Args:
        warn: called with a line if that file cannot be used; earlier sessions then count as free.
    """

    def __init__(self, folder: Folder, budget: Budget, warn: Callable[[str], None] = logger.warning) -> None:
        self._folder, self._budget = folder, budget
        self._before = folder.load(_NAME, _stored, warn) or Usage()
        self._now = Usage()
        self._written = 0.0

    @property
    def _total(self) -> Usage:
        return self._before + self._now

    @property
    def device_seconds(self) -> float:
        return self._total.device_seconds

    @property
    def money(self) -> float:
        """In the budget's currency."""
        return self._total.cost + self.device_seconds / 3600 * (self._budget.device_hour or 0.0)

    def look(self, stages: Iterable[Mapping[str, Any]], *, write: bool = False) -> str | None:
        """Take in the progress of this session's stages; returns why the run should stop, if it should."""
        now = Usage()
        for stage in stages:
            held = self._budget.workers.get(stage["name"], 0.0) * stage["seconds"]
            now += Usage(device_seconds=stage["device_seconds"] + held, cost=stage["cost"])
        self._now = now
        if now and (write or time.monotonic() - self._written >= _WRITE_SECONDS):
            self._written = time.monotonic()
            self._folder.write_json(_NAME, {"device_seconds": self.device_seconds, "cost": self._total.cost})
        return self.over()

    def over(self) -> str | None:
        """Why no more may be spent, or None."""
        budget = self._budget
        if budget.max_cost is None or self.money < budget.max_cost:
            return None
        return (
            f"the run has cost {self.money:.4g} {budget.currency} ({self.device_seconds / 3600:.3g} device hours), "
            f"and --max-cost is {budget.max_cost:.4g}. What is done is kept; a higher limit goes on from here"
        )
