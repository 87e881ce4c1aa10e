"""How fast a stage is, when it will be done, and how often to report that."""

from __future__ import annotations

import collections

#: Seconds that a rate looks back, unless fewer changes than these came in that time.
WINDOW_SECONDS, FEWEST_CHANGES = 120.0, 4
#: What must have been seen before there is a rate: seconds, and changes of the count at different moments.
ENOUGH_SECONDS, ENOUGH_CHANGES = 10.0, 2
#: Counts of one second are one change.
_APART_SECONDS = 1.0


class Pace:
    """The rate at which a count grows, over a moving window. Whoever uses it has the clock, in seconds."""

    def __init__(self) -> None:
        self._seen: collections.deque[tuple[float, float]] = collections.deque()

    def restart(self, now: float, count: float) -> None:
        """Forget what was seen: time before now, and what is counted by now (start-up, resumed work), do not matter."""
        self._seen.clear()
        self._seen.append((now, count))

    def see(self, now: float, count: float) -> None:
        """Take in the count at this moment; the first one seen is where the rate starts from."""
        seen = self._seen
        if not seen or count != seen[-1][1]:
            if len(seen) > 2 and seen[-1][0] - seen[-2][0] < _APART_SECONDS:
                seen.pop()
            seen.append((now, count))

    def rate(self, now: float) -> float | None:
        """Growth per second, or None until enough has been seen or while nothing grows."""
        seen = self._seen
        while len(seen) > FEWEST_CHANGES + 1 and seen[1][0] <= now - WINDOW_SECONDS:
            seen.popleft()
        changes = len(seen) - 1
        if changes < ENOUGH_CHANGES:
            return None
        (first, low), (last, high) = seen[0], seen[-1]
        # A count that comes at intervals is not slower in between; one that has stopped is.
        end = max(last, now - (last - first) / changes)
        if now - first < ENOUGH_SECONDS or end <= first or high <= low:
            return None
        return (high - low) / (end - first)

    def left(self, now: float, missing: float) -> float | None:
        """Seconds until so many more are counted, or None when nothing can be said yet."""
        rate = self.rate(now)
        return None if rate is None else max(missing, 0.0) / rate


class Reminder:
    """When to write the next line about progress: often at first, then rarely, so that a long run has a short log.

    Args:
        first, last: seconds between two lines at first and in the end.
    """

    def __init__(self, first: float, last: float) -> None:
        self._first, self._longest = first, last
        self._began: float | None = None
        self._written = 0.0

    def due(self, now: float) -> bool:
        """Whether a line is due; if so, the next one is due after a pause."""
        if self._began is None:
            self._began = now
        elif now - self._written < min(max(self._first, (now - self._began) / 10), self._longest):
            return False
        self._written = now
        return True
