"""Whether a model refuses every call: then the stage stops with the words of the refusal.

A refusal concerns one row (turns that do not alternate, say) or every call of its kind (an unknown parameter, a chat
template that raises), and servers do not show which. So the stage stops when enough prompts were refused in the same
words, and no call with the same sampling was answered. Refusals of a text (moderation, a prompt that is too long) are
never counted: engines leave their `EngineError.rejection` blank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Hashable, Iterator, Sequence

from ray_pipeline.engines.base import EngineError, EngineStop, Message, Sampling
from ray_pipeline.engines.lifetime import Lifetime

_PROMPTS = 3  # refused in the same words
_PER_CALL = (
    10  # and more of them for each call in progress that may still be answered: refusals are faster than replies
)
_WORDS = 8  # leading words that make two refusals the same; servers put parts of the prompt behind them


@dataclasses.dataclass
class _Kind:
    """Calls that differ by their messages only.

    Attributes:
        open: calls in progress.
        before: those of them that were made before the first refusal; None until there is one.
        refused: prompts by the words of their refusal.
    """

    answered: bool = False
    open: set[int] = dataclasses.field(default_factory=set)
    before: set[int] | None = None
    refused: dict[str, set[int]] = dataclasses.field(default_factory=dict)


class Refusals:
    """Counts the refusals of one engine.

    Args:
        model: for messages.
        remedy: what the user can do.
    """

    def __init__(self, model: str, remedy: str, lifetime: Lifetime) -> None:
        self._model, self._remedy, self._lifetime = model, remedy, lifetime
        self._kinds: dict[Hashable, _Kind] = {}
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def watch(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[None]:
        """Around one call. Raises EngineStop in place of a refusal that shows that every such call is refused; one that
        may be the first of these is not final."""
        kind = self._kinds.setdefault(_kind(sampling), _Kind())
        number = next(self._numbers)
        kind.open.add(number)
        try:
            yield
            kind.answered = True
        except EngineError as error:
            if error.rejection and not kind.answered:
                self._count(kind, number, messages, error.rejection)
                error.final = False  # it may concern every call
            raise
        finally:
            kind.open.discard(number)
            if kind.before is not None:
                kind.before.discard(number)

    def _count(self, kind: _Kind, number: int, messages: Sequence[Message], words: str) -> None:
        if kind.before is None:
            kind.before = set(kind.open)
        prompts = kind.refused.setdefault(_class(words), set())
        prompts.add(hash(tuple(tuple(sorted(message.items())) for message in messages)))
        if len(prompts) < _PROMPTS or len(prompts) <= _PER_CALL * len(kind.before - {number}):
            return
        stop = EngineStop(f"{self._model} refused {len(prompts)} prompts and answered none: {words}. {self._remedy}")
        raise self._lifetime.stop(stop) from None


def _kind(sampling: Sampling) -> Hashable:
    grammar = sampling.grammar and sampling.grammar.kind  # schemas may differ by the row
    return repr(dataclasses.replace(sampling, seed=None, grammar=None)), grammar


def _class(words: str) -> str:
    """The leading words, without what differs by the call: quoted text, figures and ids."""
    plain = re.sub(r"(['\"`]).{0,200}?\1|\S*\d\S*", " ", words.casefold())
    return " ".join(re.findall(r"[^\W\d_]+", plain)[:_WORDS])
