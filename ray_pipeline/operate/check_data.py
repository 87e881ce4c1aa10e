"""Checks of whether the prompts of a run can become training rows: their lengths, their split, and pairs of answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ray_pipeline.data.tokens import token_counter
from ray_pipeline.graph.stage import Stage
from ray_pipeline.operate.estimate import calls_model
from ray_pipeline.operate.pending import Finding, Pending, names
from ray_pipeline.training.methods import method_of
from ray_pipeline.training.spec import POLICIES

#: Share of prompts that are too long from which there is a warning.
_MANY = 0.05


def training_rows(pending: Pending) -> Iterator[Finding]:
    """Prompts fit the limit of datasets and are not all kept for validation; pairs have two answers to choose from."""
    alike: dict[tuple[Any, ...], list[Stage]] = {}
    for stage in pending.todo:
        given: Any = stage.work.settings
        if stage.role_name == "rows" and hasattr(given, "tokenizer") and "prompts" in stage.inputs:
            key = stage.inputs["prompts"].name, given.datasets.max_prompt_length, repr(given.tokenizer)
            alike.setdefault(key, []).append(stage)
            yield from _pairs(pending, stage)
    for stages in alike.values():
        yield from _prompts(pending, stages)


def _prompts(pending: Pending, stages: Sequence[Stage]) -> Iterator[Finding]:
    """
    Args:
        stages: of the same prompts, limit and tokenizer.
    """
    given: Any = stages[0].work.settings
    splits = pending.stand_ins.lengths.get(stages[0].inputs["prompts"].name)
    if not splits:
        return
    what, limit = f"prompts of {names(stages)}", given.datasets.max_prompt_length
    try:
        count = token_counter(given.tokenizer)
        long = {name: sum(len(count(chat, None)) > limit for chat in chats) for name, chats in splits.items()}
    except (OSError, ValueError) as error:  # a tokenizer of the Hub, without a network
        yield Finding(what, "not checked", f"their tokens cannot be counted here ({error})")
        return
    too_long = f"have more than {limit} tokens (datasets.max_prompt_length)"
    if all(long[name] == len(chats) for name, chats in splits.items()):
        yield Finding(what, "problem", f"all {too_long}, so no row can be made of them; raise it")
    elif "train" not in splits:
        files = [stage for stage in pending.todo if set(stages) & set(stage.inputs.values())]
        trained = any(getattr(stage.work.settings, "trained_on", False) for stage in files)
        why = "all are in the validation split, so there is nothing to train on; lower prompts.val_fraction"
        yield Finding(what, "problem" if trained else "warning", why)
    elif (share := long["train"] / len(splits["train"])) > _MANY:
        paid = "their calls are paid for and give no training row; raise it, or leave long prompts out"
        yield Finding(what, "warning", f"about {share:.0%} {too_long}: {paid}")
    else:
        yield Finding(what, "ok")


def _pairs(pending: Pending, stage: Stage) -> Iterator[Finding]:
    settings: Any = stage.work.settings
    datasets, candidates = settings.datasets, stage.inputs["candidates"]
    if "dpo" not in datasets.row_kinds or pending.tried or candidates not in pending.stand_ins:
        return
    # Of completions that the user has, only a sample of the prompts is seen here.
    drawn = any(calls_model(made) for made in (candidates, *candidates.inputs.values()))
    if not drawn or pending.stand_ins.most_rows(candidates) > 1:
        return
    files = [made for made in pending.todo if stage in made.inputs.values()]
    policies = [made for made in pending.todo if made.role_name in POLICIES and set(files) & set(made.inputs.values())]
    trained = {method_of(made.work.settings.train.method).data for made in policies}
    yield Finding(
        f"pairs of {stage.name}",
        "problem" if trained - {"kto"} or "kto" not in datasets.kinds else "warning",
        "each prompt has one candidate, so no pair can be made; set candidates.k to 2 or more, or datasets.kinds to "
        "[kto]",
    )
