"""Connecting to a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray

from ray_pipeline.engines.warm import warm_python


def start_ray(arguments: Mapping[str, Any], say: Callable[[str], None] = lambda line: None) -> bool:
    """Connect to the cluster that RAY_ADDRESS or the arguments name, or start one here; True if it is ours to end.

    Args:
        say: called with the address of the dashboard, if one is started.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, **arguments}
    if not options.get("address") and not os.environ.get("RAY_ADDRESS"):
        # A cluster of our own. Its ports are open to the network, and Ray guards them with a token by default.
        options.setdefault("include_dashboard", False)
        # Ray Train looks at its workers every 2 s, and starts a process that waits for this machine to be preempted.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        options["address"] = "local"
    elif options.pop("include_dashboard", False):
        say("ray.dashboard has no effect on a cluster that is running already")
    context: Any = ray.init(**options)
    if options.get("include_dashboard"):
        say(f"Ray dashboard: http://{context.address_info['webui_url']}; its token, if it asks: `ray get-auth-token`")
    return True


@contextlib.contextmanager
def connected(
    arguments: Mapping[str, Any] | None = None, say: Callable[[str], None] = lambda line: None, *, warm: bool = False
) -> Iterator[None]:
    """A cluster while the block runs; one that was started here ends with it.

    Args:
        arguments: of `ray.init`.
        say: see `start_ray`.
        warm: workers of a cluster that is started here will train or hold an engine of vLLM.
    """
    given = dict(arguments or {})
    elsewhere = ray.is_initialized() or given.get("address") or os.environ.get("RAY_ADDRESS")
    with warm_python(wanted=warm and not elsewhere) as python:
        if python is not None:
            given["runtime_env"] = {"py_executable": python}
        ours = start_ray(given, say)
        try:
            yield
        finally:
            if ours:
                ray.shutdown()
