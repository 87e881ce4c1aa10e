"""What an endpoint's replies have cost, counted over all processes that share a call log.

Every engine writes what it has used as one small file, `<call log>/spent-<digest>/<engine>.json`, and reads the files
of the others. The digest is of base URL and model name, so the count runs on over resumes, stages, actors and runs
that share the call log, whatever prompts and settings they have. Files hold tokens; money is tokens times the prices
that are set now, so that a price that was mistyped can be corrected.
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
from ray_pipeline.store.files import Folder, StoreError
from ray_pipeline.store.keys import digest

logger = logging.getLogger("quorum.account")

#: Seconds between two looks at what other engines have spent.
_LOOK_SECONDS = 1.0


class Prices(Settings):
    """Prices per million tokens."""

    input: float = Field(ge=0, description="prompt tokens")
    output: float = Field(ge=0, description="generated tokens")
    cached_input: float | None = Field(None, ge=0, description="prompt tokens from the cache; default: as input")
    currency: str = Field("USD", description="three-letter code")
    source: str = Field("", description="where the prices are from, and of which day; free text, read by people")

    def of(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
        """Money for so many tokens; `cached_tokens` are among the `prompt_tokens`."""
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

    def price(self, prices: Prices) -> float:
        return prices.of(self.prompt_tokens, self.cached_tokens, self.completion_tokens)


class Account:
    """One engine's part of what a model at an endpoint has used, and the sum of everybody's.

    Until `settle` has named a call log, there is nobody else.
    """

    def __init__(self, base_url: str, model: str) -> None:
        self.own = Used()
        self._others = Used()
        self._about = {"base_url": base_url, "model": model}
        self._name = f"{uuid.uuid4().hex[:12]}.json"
        self._folder: Folder | None = None
        self._written = Used()
        self._looked = -_LOOK_SECONDS
        self._turn = asyncio.Lock()

    def charge(self, completion: Completion) -> None:
        self.own.add(
            Used(1, completion.prompt_tokens, completion.cached_tokens, completion.completion_tokens),
        )

    def total(self) -> Used:
        """Own use as of now, that of others as of the last `settle`."""
        total = dataclasses.replace(self._others)
        total.add(self.own)
        return total

    async def settle(self, root: Folder) -> None:
        """Write what is new here and read what is new elsewhere; cheap to call often.

        The first call log that is named is the one, for as long as the engine lives.
        """
        async with self._turn:
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
                total.add(Used(**{field.name: int(record[field.name]) for field in dataclasses.fields(Used)}))
            except FileNotFoundError:
                continue
            except (StoreError, KeyError, TypeError, ValueError) as error:
                logger.warning("%s does not say what was spent (%s); it is not counted", folder.uri(name), error)
        return total
