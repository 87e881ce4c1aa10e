"""The cost of an endpoint's replies, counted over all processes that share a call log.

Every engine writes its usage to one small file, `<call log>/spent-<digest>/<engine>.json`, and reads the files of the
others. The digest is of base URL and model name, so the count covers all resumes, stages, actors and runs that share
the call log, whatever their prompts and settings. Files contain tokens; money is tokens times the current prices, so
that a mistyped price can be corrected.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid

from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import Completion
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest

logger = logging.getLogger("quorum.account")

#: Least seconds between two reads of the other engines' files.
_LOOK_SECONDS = 0.5


class Prices(Settings):
    """Prices per million tokens."""

    input: float = Field(ge=0, description="prompt tokens")
    output: float = Field(ge=0, description="generated tokens")
    cached_input: float | None = Field(None, ge=0, description="prompt tokens from the cache; default: as input")
    currency: str = Field("USD", description="three-letter code")
    source: str = Field("", description="source and date of the prices, as free text")

    def times(self, share: float) -> Prices:
        """The prices of calls that cost this share."""
        priced = {name: getattr(self, name) for name in ("input", "output", "cached_input")}
        return self.model_copy(update={name: share * price for name, price in priced.items() if price is not None})

    def of(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
        """Price of a number of tokens; `cached_tokens` are among the `prompt_tokens`."""
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = prompt_tokens - cached_tokens
        return (fresh * self.input + cached_tokens * cached + completion_tokens * self.output) / 1e6


@dataclasses.dataclass
class Used:
    """Calls answered and their tokens."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Used) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def count(self, completion: Completion) -> None:
        self.add(Used(1, completion.prompt_tokens, completion.cached_tokens, completion.completion_tokens))

    def price(self, prices: Prices) -> float:
        return prices.of(self.prompt_tokens, self.cached_tokens, self.completion_tokens)


class Account:
    """One engine's usage of a model at an endpoint, and the total of all engines.

    Before `settle` names a call log, the total is the engine's own usage.
    """

    def __init__(self, base_url: str, model: str, *, in_batches: bool = False) -> None:
        # Calls in batches have other prices, so they have an account of their own.
        self.own = Used()
        self._others = Used()
        self._about = {"base_url": base_url, "model": model} | ({"in_batches": True} if in_batches else {})
        self._name = f"{uuid.uuid4().hex[:12]}.json"
        self._folder: Folder | None = None
        self._written = Used()
        self._looked = -_LOOK_SECONDS
        self._refused: set[str] = set()  # files that a warning has named
        self._turn, self._turns = asyncio.Lock(), 0

    def total(self) -> Used:
        """The engine's current usage, plus that of the others at the last `settle`."""
        total = dataclasses.replace(self._others)
        total.add(self.own)
        return total

    async def settle(self, root: Folder) -> None:
        """Write the engine's new usage and read that of the others. Callers that wait for each other share one write.

        The first call log that is passed is used for the engine's lifetime.
        """
        before = self._turns
        async with self._turn:
            if self._turns > before:  # a turn that began after this call did its work
                return
            self._turns += 1
            if self._folder is None:
                self._folder = root / f"spent-{digest(self._about, size=8)}"
            own = dataclasses.replace(self.own)
            if own != self._written:
                record = {**self._about, **dataclasses.asdict(own)}
                await asyncio.to_thread(self._folder.write_json, self._name, record)
                self._written = own
            if time.monotonic() - self._looked >= _LOOK_SECONDS:
                self._others = await asyncio.to_thread(self._read_others, self._folder)
                self._looked = time.monotonic()

    def _read_others(self, folder: Folder) -> Used:
        total = Used()
        for name in folder.names(".json"):
            if name == self._name:
                continue
            try:
                record = folder.read_json(name)
                used = Used(**{field.name: int(record[field.name]) for field in dataclasses.fields(Used)})
                if min(vars(used).values()) < 0:
                    raise ValueError("negative figures")
                total.add(used)
            except FileNotFoundError:
                continue
            except (StoreError, KeyError, TypeError, ValueError, OverflowError) as error:
                if name not in self._refused:
                    self._refused.add(name)
                    logger.warning("%s is not a usage file (%s) and is not counted", folder.uri(name), error)
        return total
