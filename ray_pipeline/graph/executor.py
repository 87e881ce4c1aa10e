"""What makes the stages of a run: the protocol that the driver works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from ray_pipeline.graph.progress import ProgressBoard
from ray_pipeline.graph.session import Session, TaskGraph
from ray_pipeline.graph.stage import Stage, StageResult
from ray_pipeline.graph.stage_work import End


class Executor(Protocol):
    """Makes what a run is missing; files, receipts and ends of stages are the same whichever executor makes them."""

    @property
    def live(self) -> bool:
        """Whether a live display suits it: not where a debugger may want the terminal."""
        ...

    def open(
        self, session: Session, todo: Sequence[Stage], say: Callable[[str], None]
    ) -> AbstractContextManager[ProgressBoard]:
        """Start what the work needs, end it afterwards, and give the board that workers report to.

        Args:
            todo: the stages that will be made.
            say: takes a line for the run's log.
        """
        ...

    def run(self, graph: TaskGraph, done: Mapping[str, StageResult]) -> Iterator[tuple[str, End]]:
        """Make the graph; yields each stage's name and end as it comes. Stages that read a failed one end as failures.

        Args:
            graph: its tasks carry the session with the board.
            done: by name, the results of finished stages.
        """
        ...
