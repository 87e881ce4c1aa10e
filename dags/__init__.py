"""The workflows: each module wires stages and reads like the figure of its method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dags.agreement import agreement
from dags.baselines import baselines
from dags.benchmarks import benchmarks
from dags.dmapo import dmapo
from dags.fellowship import fellowship
from dags.winrate import winrate
from ray_pipeline.graph.stage import Dag

#: Name of a workflow → the function that wires it from its configuration and the run folder.
DAGS: dict[str, Callable[[Any, str], Dag]] = {
    "dmapo": dmapo,
    "baselines": baselines,
    "fellowship": fellowship,
    "agreement": agreement,
    "winrate": winrate,
    "benchmarks": benchmarks,
}
