"""Any OpenAI-compatible endpoint behind ``ChatEngine``.

Errors and their handling:

- **Errors of one call** (a rejected message, a reply that is not JSON, a broken connection, a time-out, a 500) are
  retried with exponential back-off and jitter, ``retries`` times; then the call raises :class:`EngineError`.
- **Errors of the endpoint** (unreachable, 502, 503, 504, 429) are waited out, honouring ``Retry-After``. After
  ``patience_s`` seconds without any reply the engine stops, so that a wrong address does not cost a night.
- **Errors for the user** (rejected key, unknown model, no credit, unsupported parameter, spent budget) stop the engine
  immediately, and refusals in other words once they turn out to concern every call (see ``refusals``). A stopped engine
  refuses every later call with the same message.
- **A server without the system role** gets the system text in the user turn (see ``system_role``).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_pipeline.engines.account import Used
from ray_pipeline.engines.base import (
    BudgetSpent,
    Completion,
    EngineError,
    EngineStartError,
    EngineStop,
    Grammar,
    Message,
    PromptTooLong,
    Sampling,
)
from ray_pipeline.engines.endpoint_batches import BatchConnection
from ray_pipeline.engines.endpoint_budget import Budget
from ray_pipeline.engines.endpoint_connection import Connection
from ray_pipeline.engines.endpoint_errors import Refused, clean
from ray_pipeline.engines.endpoint_replies import other_model, read_completion, served_models
from ray_pipeline.engines.endpoint_requests import AS_TEXT, AS_USER, Requests
from ray_pipeline.engines.endpoint_retry import Retries
from ray_pipeline.engines.endpoint_settings import OpenAISpec, extra_problem
from ray_pipeline.engines.lifetime import Lifetime
from ray_pipeline.engines.refusals import Refusals
from ray_pipeline.engines.thoughts import answered
from ray_pipeline.engines.usage import prompt_token_estimate, prompt_was_cut
from ray_pipeline.store.files import Folder

logger = logging.getLogger("quorum.openai")

_PROBE = Grammar.json(
    {
        "type": "object",
        "properties": {"verdict": {"type": "string", "enum": ["green", "blue"]}},
        "required": ["verdict"],
        "additionalProperties": False,
    }
)
_PROBE_MESSAGES: list[Message] = [
    {"role": "system", "content": "Answer with one JSON object and nothing else."},
    {"role": "user", "content": 'Name a colour: {"verdict": "green"}'},
]
_PROBE_TOKENS = 64
_REMEDY = (
    "Change what these words name: the key's rights, the sampling's parameters, endpoint.extra_body, endpoint.omit, or "
    "the server's chat template; then rerun the same command to resume"
)


@dataclasses.dataclass
class EndpointStats(Used):
    """An engine's counters since its start: answered calls and their tokens, and every HTTP request for a reply."""

    requests: int = 0
    cost: float = 0.0


class OpenAIEngine:
    """A :class:`~ray_pipeline.engines.base.ChatEngine` over an endpoint; the module's docstring has its rules.

    The constructor makes no request; :meth:`start`, or the first :meth:`chat`, does. The engine belongs to the event
    loop that it was started on.

    Attributes:
        notes: messages for the user, each once: the engine's log is not on the terminal.
        concurrency: calls in progress; further ones wait. More are of no use (`useful_concurrency`).
    """

    def __init__(self, spec: OpenAISpec) -> None:
        self.spec = spec
        self.notes: list[str] = []
        self.keeps_thoughts = spec.keeps_thoughts
        self._settings = spec.endpoint
        self._at = f"{spec.model!r} at {spec.endpoint.address}"
        self.concurrency = spec.endpoint.concurrency if spec.batch is None else spec.batch.requests
        self.useful_concurrency = self.concurrency
        self._slots = asyncio.Semaphore(self.concurrency)
        self._lifetime = Lifetime()
        self._ready = False
        self._requests = Requests(spec, self._warn_once)
        self._connection = (Connection if spec.batch is None else BatchConnection)(spec, self._lifetime)
        self._retries = Retries(spec, self._lifetime, self._connection)
        self._budget = Budget(spec, self._lifetime)
        self._refusals = Refusals(self._at, _REMEDY, self._lifetime)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Model name and address, or the model's own identity, and the settings that change replies; never the API
        key. Needs no network."""
        return {
            "engine": "openai",
            "model": self._settings.known_as(self.spec.model),
            **self._settings.answers(),
        }

    @property
    def has_moved(self) -> Callable[[Mapping[str, Any]], bool] | None:
        """Whether another identity is that of this model at another address; None if its identity has no address."""
        name, own = f"endpoint:{self.spec.model}@", self.identity

        def moved(other: Mapping[str, Any]) -> bool:
            same = str(other.get("model", "")).startswith((name + "http://", name + "https://"))
            return same and other["model"] != own["model"] and {**other, "model": own["model"]} == own

        return moved if self._settings.identity is None else None

    async def start(self) -> None:
        """Contact the endpoint and check that the model answers; only once, however often it is called.

        Raises:
            EngineStartError: the check failed; the message says what to change. Later calls raise it again.
            BudgetSpent: not even the first short call is within the budget.
        """
        await self._lifetime.start(self._start)

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """Draw one reply; see :class:`~ray_pipeline.engines.base.ChatEngine` for what is raised."""
        for name, _ in sampling.extra:
            problem = extra_problem(name, "extra")
            if problem:
                raise EngineError(problem)
        begin = time.monotonic()
        async with self._slots:
            self._lifetime.check_open()
            try:
                if not self._ready:
                    # The start makes a call, which a spent budget must prevent.
                    self._budget.check(prompt_token_estimate(messages), sampling.max_tokens)
                    await self.start()
                with self._refusals.watch(messages, sampling):
                    reply = await self._ask(messages, sampling)
            except EngineStop as error:
                raise self._lifetime.stop(error) from None
        return dataclasses.replace(reply, latency_s=time.monotonic() - begin)

    def cost(self, completion: Completion) -> float:
        prices = self._settings.prices
        if prices is None:
            return 0.0
        return prices.of(completion.prompt_tokens, completion.cached_tokens, completion.completion_tokens)

    async def settle(self, root: Folder) -> None:
        await self._connection.settle(root)
        await self._budget.account.settle(root)

    def stats(self) -> EndpointStats:
        """Totals so far, including the short call at the start."""
        own, prices = self._budget.account.own, self._settings.prices
        cost = own.price(prices) if prices else 0.0
        return EndpointStats(**vars(own), requests=self._connection.requests, cost=cost)

    async def close(self) -> None:
        """Close the connections. Later chats raise EngineDead."""
        self._lifetime.closed = True
        if self._lifetime.starting is not None:
            self._lifetime.starting.cancel()
        await self._connection.close()

    # -- starting ----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        try:
            self._connection.open()
            await self._read_models()
            if self.spec.canary:
                await self._prove()
        except (BudgetSpent, EngineStartError) as error:
            raise self._lifetime.stop(error) from None
        except EngineStop as error:
            raise self._lifetime.stop(EngineStartError(str(error))) from None
        self._ready = True
        form = (
            "none (text)"
            if self._requests.text_only
            else "vLLM's fields"
            if self._requests.uses_vllm_fields
            else "JSON schema"
        )
        logger.info("%s at %s answers; structured output: %s", self.spec.model, self._settings.address, form)

    async def _read_models(self) -> None:
        """Read the list of models, if there is one: whether the model is served, by vLLM or not, and its context."""
        try:
            listed = await self._retries.persist(self._connection.list_models, retries=1)
        except EngineError as error:  # many endpoints have no such list
            logger.debug("%s lists no models: %s", self._settings.address, error)
            return
        self._connection.models = models = served_models(listed, self.spec.model)
        self._requests.is_vllm_server = models.is_vllm_server
        if models.names and self.spec.model not in models.names and not self.spec.canary:
            # Not an error yet: aliases and deployments may be served without being listed.
            self._warn_once(models.unknown(self.spec.model, self._settings.address, "it is not in the list of models"))

    async def _prove(self) -> None:
        """Make one short call to check address, key, model and structured output."""
        requests, at = self._requests, self._at
        try:
            reply = await self._probe()
        except PromptTooLong as error:
            raise EngineStartError(f"even a short prompt does not fit {at}: {error}") from None
        except EngineError as error:
            address = "Check that base_url is the address of an OpenAI-compatible endpoint; it usually ends with /v1"
            raise EngineStartError(
                f"the first call to {at} failed: {error}. {_REMEDY if error.rejection else address}"
            ) from None
        if requests.text_only:
            return
        if requests.gave_up(_PROBE):
            requests.text_only = True  # the user is warned already
        elif reply.finish_reason != "length" and not _obeys(reply.text):
            # A model that thinks first may have used up the tokens; that would prove nothing.
            text = clean(reply.text[:80], self._connection.key)
            problem = f"{at} does not obey structured output (it replied {text!r} instead of a JSON object)"
            if self._settings.structured != "auto":
                raise EngineStartError(f"{problem}; set endpoint.structured: text to read replies without it")
            requests.text_only = True
            self._warn_once(f"{problem}; {AS_TEXT}")

    async def _probe(self) -> Completion:
        """The reply to the short call. What a server rejects in words that are not understood is found by trying."""
        requests = self._requests
        sampling = Sampling(max_tokens=_PROBE_TOKENS, grammar=_PROBE)
        try:
            return await self._ask(_PROBE_MESSAGES, sampling)
        except EngineError as error:
            if not error.rejection.startswith("HTTP 4") or error.rejection.startswith("HTTP 403"):
                raise
            reason = error
        was = requests.text_only, requests.no_system
        # The most likely reason first.
        for text_only, no_system in ((True, False), (False, True), (True, True)):
            if (text_only and (was[0] or self._settings.structured != "auto")) or (no_system and was[1]):
                continue
            requests.text_only, requests.no_system = text_only or was[0], no_system or was[1]
            with contextlib.suppress(EngineError):
                reply = await self._ask(_PROBE_MESSAGES, sampling)
                if text_only:
                    self._warn_once(f"{self._at} rejects structured output ({reason}); {AS_TEXT}")
                if no_system:
                    self._warn_once(f"{self._at} rejects system messages ({reason}); {AS_USER}")
                return reply
        raise reason

    # -- answering ---------------------------------------------------------------------------------------------------

    async def _ask(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """One reply, by a form of the request that the server accepts."""
        prompt_tokens = prompt_token_estimate(messages)
        most = prompt_tokens + sampling.max_tokens
        async with self._budget.reserve(prompt_tokens, sampling.max_tokens) as reservation:
            if self._budget.in_progress == 1:  # time without requests does not count as silence
                self._retries.silent_since = None
            while True:
                body = self._requests.body(messages, sampling)

                async def request(body: Mapping[str, Any] = body) -> Completion:
                    await reservation.renew()
                    charge, starting = reservation.charge, not self._ready
                    value = await self._connection.post(body, sampling, prompt_tokens, charge, starting=starting)
                    completion = read_completion(value, sampling, prompt_tokens, charge, self._note)
                    self._connection.answered += 1
                    return completion

                try:
                    completion = await self._retries.persist(request, tokens=most)
                except Refused as refused:
                    self._requests.adapt(refused, body, sampling)
                    continue
                except EngineError as error:
                    error.unread_cost = self._budget.price(reservation.unread)
                    raise
                self._retries.token_pace.give_back(most - completion.prompt_tokens - completion.completion_tokens)
                self._budget.account.own.count(completion)
                if other_model(self.spec.model, completion.answered_by):
                    self._note(
                        f"is answered by another model: {clean(completion.answered_by[:80], self._connection.key)!r}"
                    )
                told = any(" cuts prompts: " in note for note in self.notes)
                if not told and prompt_was_cut(messages, completion.prompt_tokens, completion.cached_tokens):
                    self._note(
                        f"cuts prompts: it read {completion.prompt_tokens} tokens of one with "
                        f"{sum(len(m['content']) for m in messages):,} characters; raise the server's context (Ollama: "
                        "num_ctx), or drop long prompts. Rows of such calls have prompt_cut: true"
                    )
                cost = self._budget.price(reservation.unread)
                return answered(dataclasses.replace(completion, unread_cost=cost), self.keeps_thoughts)

    def _note(self, message: str) -> None:
        self._warn_once(f"{self._at} {message}")

    def _warn_once(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)
            logger.warning("%s", message)


def _obeys(text: str) -> bool:
    try:
        return json.loads(text) in ({"verdict": "green"}, {"verdict": "blue"})
    except (ValueError, RecursionError):
        return False
