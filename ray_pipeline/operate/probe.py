"""A share of the prompts through the real engines, to learn how long replies are and how long calls take.

The probe is a run like any other, in a folder of its own beside the planned run, with the planned run's call log: what
it asks is not asked again. Its prompts are those of the smallest hash, so they are among the run's prompts.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.console import Console

from ray_pipeline.data.prompts import read_prompts
from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.driver import execute
from ray_pipeline.graph.receipts import receipt_name
from ray_pipeline.graph.results import of_role
from ray_pipeline.graph.stage import Dag, StageResult, StageStop
from ray_pipeline.operate.prices import CallTime, KeptShare, Rates, ReplyTokens
from ray_pipeline.operate.run_settings import executor_of, run_settings
from ray_pipeline.stats.bootstrap import drawn_ratio, percentiles, sample_counts
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.locations import beside

#: Fewer prompts say nothing about a mean.
_LEAST = 16
_DRAWS = 500
#: By which share the speed of the whole run may be off a probe's, whose engine is seldom full: as in a rates file.
_SPREAD = 0.25


def probe(
    config: Any,
    folder: str,
    share: float,
    wire: Callable[[Any, str], Dag],
    given: Rates,
    console: Console,
) -> Rates:
    """Run the probe and return the rates with what it measured put in place.

    Args:
        folder: of the planned run.
        share: of the prompts.
        wire: makes the workflow.

    Raises:
        StoreError: a stage of the probe failed, or all of its calls were in the log already.
    """
    total = read_prompts(config.prompt_settings, lambda *_: None, 64).counts["kept"]
    size = min(total, max(_LEAST, math.ceil(total * share)))
    console.print(f"probe: {size} of {total} prompts ({size / total:.1%})", markup=False, highlight=False)
    prompts = config.prompts.model_copy(update={"max_prompts": size, "num_shards": min(config.prompts.num_shards, 8)})
    small = config.model_copy(update={"prompts": prompts})
    place = beside(folder, "-probe")
    outcome = execute(
        wire(small, place),
        run_settings(small, place, calls_root=config.calls_root(folder)),
        executor_of(small, max_stages=1),  # side by side, stages would slow each other and be measured wrong
        to_group="datasets",
        console=console,
    )
    for name, failure in outcome.failures.items():
        raise StoreError(f"the probe's stage {name} failed: {failure.reason}")
    source = f"probe of {size} prompts in {place}"
    try:
        return measured(outcome.results, given, source)
    except StageStop as error:
        raise StoreError(f"{error}; delete {place} and the call log, or give --rates") from error


def measured(results: Mapping[str, StageResult], given: Rates, source: str) -> Rates:
    """Rates from a run's receipts: tokens a reply, device seconds a call with an interval, and the share of candidates
    that the gate kept. Engine starts are left out.

    Raises:
        StageStop: no stage made a call.
    """
    today = datetime.date.today()
    replies: dict[str, float] = {}
    stages: dict[str, CallTime] = {}
    for name, result in results.items():
        calls, replied, tokens, seconds = _by_shard(result)
        if calls.sum() <= 0:
            continue
        replies[name] = float(replied.sum() / calls.sum())
        took = max(0.0, float(seconds.sum() / calls.sum()))
        short, long = _interval(tokens, calls)
        low, high = took * short / (1 + _SPREAD), took * long * (1 + _SPREAD)
        stages[name] = CallTime(seconds_per_call=took, low=low, high=high, source=source, date=today)
    if not stages:
        raise StageStop("every call of the probe was in the call log already, so nothing was measured")
    kept = given.kept_share
    decisions = next(iter(of_role(results, "decisions")), None)
    if decisions is not None and (counts := decisions.facts["counts"]) and sum(counts.values()):
        share = (counts["desirable"] + counts["undesirable"]) / sum(counts.values())
        kept = KeptShare(share=share, source=source, date=today)
    lengths = given.reply_tokens or ReplyTokens(tokens=replies, source=source, date=today)
    return given.model_copy(update={"stages": {**stages, **given.stages}, "reply_tokens": lengths, "kept_share": kept})


def _by_shard(result: StageResult) -> tuple[np.ndarray, ...]:
    """Engine calls, completion tokens, all tokens and device seconds (engine start left out) of each shard."""
    rows: list[tuple[float, ...]] = []
    if result.usage.calls_engine:
        receipts = Folder(result.folder) / "_receipts"
        for shard in range(result.num_shards):
            usage = Usage.read(receipts.read_json(receipt_name(shard))["usage"])
            busy = usage.device_seconds - usage.start_seconds
            rows.append((usage.calls_engine, usage.completion_tokens, usage.tokens, busy))
    return tuple(np.array(rows or [(0.0,) * 4]).T)


def _interval(tokens: np.ndarray, calls: np.ndarray) -> tuple[float, float]:
    """How far the tokens of a call are off the mean in other prompts: a 95 % bootstrap interval over shards, as shares.

    Of tokens and not of seconds: shards of an actor share its time, and which of them reports it is luck.
    """
    mean = tokens.sum() / calls.sum()
    bounds = percentiles(drawn_ratio(tokens, calls, sample_counts(len(calls), _DRAWS, 0)) / mean, 1.0)
    low, high = np.nan_to_num(bounds, nan=1.0).tolist()  # shards that do not differ
    return low, high
