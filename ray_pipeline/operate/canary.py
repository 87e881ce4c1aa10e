"""Test calls to endpoints and local engines before a run: short texts in the forms that the stages to come will use.

They go through the stages' own engine class, so a refusal has the server's words and its remedy. They are not in the
call log; their cost is counted where that of every call of the engine is, in the model's account beside the call log.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence

from ray_pipeline.engines import core_server
from ray_pipeline.engines.base import EngineDead, EngineError, EngineStop, Message, Metered
from ray_pipeline.engines.endpoint_settings import OpenAISpec
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.engines.openai import OpenAIEngine
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.graph.stage import Stage
from ray_pipeline.operate.estimate import Form
from ray_pipeline.operate.pending import Finding, Pending, names
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder

#: Forms that are tried on one engine; more differ in little.
_MOST = 8
_REPLAY = "calls.replay_only answers all calls from the call log"
_TEXTS = {"system": "This is a test call.", "assistant": "OK."}


def endpoints(pending: Pending) -> Iterator[Finding]:
    """Keys are in the environment, and every endpoint answers calls of the forms that the stages to do will make."""
    yield from _names_alike(pending)
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


def _names_alike(pending: Pending) -> Iterator[Finding]:
    """Models of one name at two addresses: without an identity, the calls of one would answer those of the other."""
    seen: dict[str, tuple[str, ModelSettings]] = {}
    for key, model in pending.config.served().items():
        if model.endpoint is None or model.endpoint.identity is not None:
            continue
        first, other = seen.setdefault(model.model, (key, model))
        if other.endpoint is not None and other.endpoint.address != model.endpoint.address:
            own = model.endpoint.known_as(model.model).removeprefix("endpoint:")
            yield Finding(
                f"{first} and {key}",
                "problem",
                f"both are {model.model!r}, at {other.endpoint.address} and {model.endpoint.address}; set "
                f"{key}.endpoint.identity: {own} if their weights differ, or one endpoint.identity for both if not",
            )


def engines(pending: Pending) -> Iterator[Finding]:
    """Every local engine starts and answers calls of the forms that the stages to do will make; one after the other, in
    this process. Only on request: starting an engine takes as long as starting a stage."""
    local = {key: found for key, found in pending.models.items() if found[0].is_here}
    if pending.engines is None or not local:
        return
    if not pending.engines:
        why = "not started; run `quorum check --engines` to start each and make test calls"
        yield Finding(f"local engine{'s' * (len(local) > 1)} of {', '.join(local)}", "not checked", why)
        return
    with core_server.kept():  # from engine to engine
        yield from _started(pending, local)


def _started(pending: Pending, local: Mapping[str, tuple[ModelSettings, Sequence[Stage]]]) -> Iterator[Finding]:
    for key, (model, stages) in local.items():
        what = f"local engine of {key} ({model.shown}, for {names(stages)})"
        if pending.config.calls.replay_only:
            yield Finding(what, "not checked", _REPLAY)
        elif pending.on_cluster:
            yield Finding(
                what,
                "not checked",
                "it runs on the nodes of the cluster; run this command on such a node with ray.address=local",
            )
        elif pending.scope != "all" and not os.path.isdir(model.model):
            yield Finding(what, "not checked", "needs the network: a model of the Hugging Face Hub")
        else:
            yield from _asked(pending, what, model, stages)


def _not_asked(pending: Pending, key: str, model: ModelSettings) -> str:
    """Why an endpoint gets no call, or an empty text."""
    if pending.config.calls.replay_only:
        return _REPLAY
    if not model.canary:
        return f"{key}.canary is false"
    return "" if pending.scope == "all" else "needs the network"


def _asked(pending: Pending, what: str, model: ModelSettings, stages: Sequence[Stage]) -> Iterator[Finding]:
    made = {} if pending.tried else pending.stand_ins.estimates
    forms: dict[str, Form] = {}
    for stage in stages:
        forms |= made[stage.name].forms if stage.name in made else {}
    calls_root = Folder(pending.session.calls_root)
    if model.endpoint is not None:
        with contextlib.suppress(StoreError):  # `folders` reports it
            calls_root.make(pending.config.run.shared)
    told = canary(model, list(forms.values()), calls_root)
    if told.problem:
        yield Finding(what, "problem", told.problem)
        return
    for note in told.notes:
        yield Finding(what, "warning", note)
    cost = f", cost {told.cost:.3g} {pending.config.currency()}" if told.cost else ""
    started = f"started in {told.start_seconds:.1f} s; " if told.start_seconds else ""
    seconds = f" in {told.seconds:.1f} s" if told.start_seconds else ""
    yield Finding(what, "ok", f"{started}{told.calls} test calls answered{seconds} ({told.tokens} tokens{cost})")
    if pending.tried:
        yield Finding(f"forms of the calls of {names(stages)}", "not checked", pending.tried)


@dataclasses.dataclass(frozen=True)
class Told:
    """How an engine took its test calls.

    Attributes:
        problem: in words for the user; empty if all were answered.
        notes: what the engine warns of.
        cost: by the model's prices.
        start_seconds: duration of the start of a local engine; 0 for an endpoint.
        seconds: duration of the test calls.
    """

    problem: str
    notes: Sequence[str]
    calls: int
    tokens: int
    cost: float
    start_seconds: float
    seconds: float


def canary(model: ModelSettings, forms: Sequence[Form], calls_root: Folder) -> Told:
    """Make the engine's own first call, and one of each form.

    Args:
        calls_root: folder of the call log, for the account and the budget of the model.
    """
    if model.endpoint is None:
        return asyncio.run(_canary(VllmEngine(model.spec()), forms[:_MOST], calls_root))
    return asyncio.run(_canary(OpenAIEngine(OpenAISpec(model.model, model.endpoint)), forms[:_MOST], calls_root))


async def _canary(engine: OpenAIEngine | VllmEngine, forms: Sequence[Form], calls_root: Folder) -> Told:
    problem, begin = "", time.perf_counter()
    try:
        if isinstance(engine, Metered):
            await engine.settle(calls_root)
        await engine.start()
        begin = time.perf_counter()
        for roles, sampling in forms:
            await engine.chat(_messages(roles), sampling)
    except (EngineError, EngineStop, EngineDead, StoreError, OSError) as error:  # the account may be unreadable
        problem = str(error)
    finally:
        seconds = time.perf_counter() - begin
        if isinstance(engine, Metered):
            with contextlib.suppress(StoreError, OSError):
                await engine.settle(calls_root)
        await engine.close()
    made, cost, started = engine.stats(), 0.0, 0.0
    if isinstance(engine, OpenAIEngine):
        cost = engine.stats().cost
    else:
        started = engine.start_seconds
    tokens = made.prompt_tokens + made.completion_tokens
    return Told(problem, tuple(engine.notes), made.calls, tokens, cost, started, seconds)


def _messages(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": _TEXTS.get(role, "Reply as briefly as you can.")} for role in roles]
