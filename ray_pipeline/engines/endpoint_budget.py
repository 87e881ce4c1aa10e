"""The budget of a model at an endpoint.

The next call is made only if the amount spent, plus the maximum cost of the calls in progress, plus its own maximum
cost, is within ``budget``. The maximum is ``max_tokens`` new tokens and one prompt token for every three bytes, so the
budget holds to within the error of that estimate. The amount spent covers every engine that shares the call log (see
``account``); the figures of other processes are up to two seconds old and exclude their calls in progress, so several
actors together may exceed the budget by what they spend in that time.

Costs follow the server's ``usage``, also of replies that cannot be read. Missing or impossible figures are replaced by
estimates, for an unreadable reply by the maximum. Requests that end before a reply begins (errors, time-outs) are not
counted, though some servers charge them.
"""

from __future__ import annotations

import asyncio

from ray_pipeline.engines.account import Account, Used
from ray_pipeline.engines.base import BudgetSpent
from ray_pipeline.engines.endpoint_settings import OpenAISpec
from ray_pipeline.engines.lifetime import Lifetime


class Budget:
    """Reserves the maximum cost of each call in progress.

    Attributes:
        account: usage of the model, over all engines that share the call log.
        in_progress: number of calls.
    """

    def __init__(self, spec: OpenAISpec, lifetime: Lifetime) -> None:
        self._spec, self._lifetime = spec, lifetime
        self.account = Account(spec.endpoint.address, spec.model, in_batches=spec.batch is not None)
        self.in_progress = 0
        self._reserved = 0.0  # maximum cost of the calls in progress
        self._released = asyncio.Event()

    def reserve(self, prompt_tokens: int, new_tokens: int) -> Reservation:
        """A reservation for one call, to be used with ``async with``."""
        return Reservation(self, self._cost(prompt_tokens, new_tokens))

    async def take(self, cost: float) -> None:
        """Reserve a cost; wait until it is within the budget.

        Raises:
            BudgetSpent: it is not, and no call is in progress that could turn out cheaper.
        """
        while not self._fits(cost):
            if not self.in_progress:
                raise self._spent(cost)
            self._released.clear()
            await self._released.wait()
            self._lifetime.check_open()
        self._reserved += cost
        self.in_progress += 1

    def release(self, cost: float) -> None:
        """End the reservation of a cost."""
        self.in_progress -= 1
        self._reserved = self._reserved - cost if self.in_progress else 0.0
        self._released.set()

    def price(self, used: Used) -> float:
        prices = self._spec.endpoint.prices
        return used.price(prices) if prices else 0.0

    def check(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise BudgetSpent as :meth:`reserve` does, without waiting."""
        cost = self._cost(prompt_tokens, new_tokens)
        if not self.in_progress and not self._fits(cost):
            raise self._spent(cost)

    def _cost(self, prompt_tokens: int, new_tokens: int) -> float:
        return self.price(Used(1, prompt_tokens, 0, new_tokens))

    def _fits(self, cost: float) -> bool:
        budget, prices = self._spec.endpoint.budget, self._spec.endpoint.prices
        if budget is None or prices is None:
            return True
        return self.account.total().price(prices) + self._reserved + cost <= budget

    def _spent(self, cost: float) -> BudgetSpent:
        endpoint, used = self._spec.endpoint, self.account.total()
        prices, budget = endpoint.prices, endpoint.budget
        assert prices is not None and budget is not None
        return BudgetSpent(
            f"the budget for {self._spec.model} at {endpoint.address} is spent: {used.price(prices):.6g} of "
            f"{budget:g} {prices.currency} spent ({used.calls} calls, {used.prompt_tokens} prompt and "
            f"{used.completion_tokens} new tokens, all runs on this call log), and the next call may cost "
            f"{cost:.2g}. All replies are in the call log: raise endpoint.budget of the model and rerun the same "
            "command to resume"
        )


class Reservation:
    """The maximum cost of one call, reserved in the budget while the call is in progress.

    Attributes:
        unread: usage of replies to the call that could not be read.
    """

    def __init__(self, budget: Budget, cost: float) -> None:
        self.unread = Used()
        self._budget, self._cost = budget, cost
        self._held = self._settled = False

    async def __aenter__(self) -> Reservation:
        await self._budget.take(self._cost)
        self._held = self._settled = True
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._held:
            self._held = False
            self._budget.release(self._cost)

    def charge(self, used: Used) -> None:
        """Count a reply that cannot be read."""
        self.unread.add(used)
        self._budget.account.own.add(used)
        self._settled = False

    async def renew(self) -> None:
        """Before the next attempt: reserve again if the last one was charged. Raises as :meth:`Budget.take`."""
        if not self._settled:
            await self.__aexit__()
            await self.__aenter__()
