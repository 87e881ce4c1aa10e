"""Test calls to the endpoints before a run: short texts in the forms that the stages to come will use.

They go through the stages' own engine class, so a refusal has the server's words and its remedy. They are not in the
call log; their cost is counted where that of every call of the engine is, in the model's account beside the call log.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

from ray_pipeline.engines.base import EngineError, EngineStop, Message
from ray_pipeline.engines.endpoint_settings import OpenAISpec
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.engines.openai import OpenAIEngine
from ray_pipeline.graph.stage import Stage
from ray_pipeline.operate.estimate import Form
from ray_pipeline.operate.pending import Finding, Pending, names
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder

#: Forms that are tried at one endpoint; more differ in little.
_MOST = 8
_TEXTS = {"system": "This is a test call.", "assistant": "OK."}


def endpoints(pending: Pending) -> Iterator[Finding]:
    """Keys are in the environment, and every endpoint answers calls of the forms that the stages to do will make."""
    for key, (model, stages) in pending.models.items():
        if model.endpoint is None:
            continue
        what = f"{key} ({model.shown} at {model.endpoint.address}, for {names(stages)})"
        variable = model.endpoint.api_key_env
        if variable is not None and not os.environ.get(variable, "").strip():
            if pending.on_cluster:
                yield Finding(what, "not checked", f"{variable} is not set here; the nodes are checked at the start")
            else:
                yield Finding(
                    what,
                    "problem",
                    f"the environment variable {variable} is not set; set it to the API key, or set "
                    f"{key}.endpoint.api_key_env: null for a server without keys",
                )
        elif why := _not_asked(pending, key, model):
            yield Finding(what, "not checked", why)
        else:
            yield from _asked(pending, what, model, stages)


def _not_asked(pending: Pending, key: str, model: ModelSettings) -> str:
    """Why an endpoint gets no call, or an empty text."""
    if pending.config.calls.replay_only:
        return "calls.replay_only answers all calls from the call log"
    if not model.canary:
        return f"{key}.canary is false"
    return "" if pending.scope == "all" else "needs the network"


def _asked(pending: Pending, what: str, model: ModelSettings, stages: Sequence[Stage]) -> Iterator[Finding]:
    made = {} if pending.tried else pending.stand_ins.estimates
    forms: dict[str, Form] = {}
    for stage in stages:
        forms |= made[stage.name].forms if stage.name in made else {}
    calls_root = Folder(pending.session.calls_root)
    with contextlib.suppress(StoreError):  # `folders` reports it
        calls_root.make(pending.config.run.shared)
    told = canary(model, list(forms.values()), calls_root)
    if told.problem:
        yield Finding(what, "problem", told.problem)
        return
    for note in told.notes:
        yield Finding(what, "warning", note)
    cost = f", cost {told.cost:.3g} {pending.config.currency()}" if told.cost else ""
    yield Finding(what, "ok", f"{told.calls} test calls answered ({told.tokens} tokens{cost})")
    if pending.tried:
        yield Finding(f"forms of the calls of {names(stages)}", "not checked", pending.tried)


@dataclasses.dataclass(frozen=True)
class Told:
    """How an endpoint took its test calls.

    Attributes:
        problem: in words for the user; empty if all were answered.
        notes: what the engine warns of.
        cost: by the model's prices.
    """

    problem: str
    notes: Sequence[str]
    calls: int
    tokens: int
    cost: float


def canary(model: ModelSettings, forms: Sequence[Form], calls_root: Folder) -> Told:
    """Make the engine's own first call, and one of each form.

    Args:
        calls_root: folder of the call log, for the account and the budget of the model.
    """
    assert model.endpoint is not None
    return asyncio.run(_canary(OpenAISpec(model.model, model.endpoint), forms[:_MOST], calls_root))


async def _canary(spec: OpenAISpec, forms: Sequence[Form], calls_root: Folder) -> Told:
    engine, problem = OpenAIEngine(spec), ""
    try:
        await engine.settle(calls_root)
        await engine.start()
        for roles, sampling in forms:
            await engine.chat(_messages(roles), sampling)
    except (EngineError, EngineStop, StoreError) as error:
        problem = str(error)
    finally:
        with contextlib.suppress(StoreError):
            await engine.settle(calls_root)
        await engine.close()
    made = engine.stats()
    return Told(problem, tuple(engine.notes), made.calls, made.prompt_tokens + made.completion_tokens, made.cost)


def _messages(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": _TEXTS.get(role, "Reply as briefly as you can.")} for role in roles]
