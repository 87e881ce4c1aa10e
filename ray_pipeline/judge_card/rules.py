"""How each public set counts a judge's verdicts on one item.

A verdict is the labels of the best answers (`A`; `AB` where A and B are tied), or None where the reply could not be
read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

Verdicts = Sequence[str | None]
"""Of one item, in the orders in which its answers were shown; by answer, whatever the order."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A way to count.

    Attributes:
        credit: verdicts, labels (by people; one where the set has a truth) and number of answers → 0 to 1.
        text: the rule in words, for the page.
    """

    credit: Callable[[Verdicts, Sequence[str], int], float]
    text: str


def both_orders(verdicts: Verdicts, labels: Sequence[str], answers: int) -> float:
    """JudgeBench (Tan et al. 2024; `utils/metrics.py`): an order for the label counts +1, one for the other answer −1,
    a tie or an unread reply 0; right if the sum is positive."""
    (label,) = labels
    return float(sum((verdict == label) - (verdict in _others(label, answers)) for verdict in verdicts) > 0)


def each_order(verdicts: Verdicts, labels: Sequence[str], answers: int) -> float:
    """LLMBar (Zeng et al. 2024, average accuracy): the mean over the orders; ties and unread replies are wrong."""
    (label,) = labels
    return sum(verdict == label for verdict in verdicts) / len(verdicts)


def best_of_many(verdicts: Verdicts, labels: Sequence[str], answers: int) -> float:
    """RewardBench 2 (Malik et al. 2025; `scripts/run_generative_v2.py`): 1 for the right answer; answers that are tied
    share it, and an unread reply counts as a tie of all."""
    (label,) = labels
    shares = [1 / answers if verdict is None else (label in verdict) / len(verdict) for verdict in verdicts]
    return sum(shares) / len(shares)


def human_label(verdicts: Verdicts, labels: Sequence[str], answers: int) -> float:
    """FairEval, PandaLM: one verdict of three classes, where two orders that differ are a tie."""
    (label,) = labels
    return float(_settled(verdicts) == label)


def human_votes(verdicts: Verdicts, labels: Sequence[str], answers: int) -> float:
    """MT-Bench (Zheng et al. 2023, §4.2, set-up S1): the chance that a person who judged the pair agrees with the
    verdict; ties are a class of their own, and two orders that differ are a tie."""
    verdict = _settled(verdicts)
    return sum(label == verdict for label in labels) / len(labels)


def _settled(verdicts: Verdicts) -> str | None:
    """One vote on two answers; unread as a whole where any order is."""
    if None in verdicts:
        return None
    best = {label for verdict in verdicts if verdict is not None for label in verdict}
    return best.pop() if len(best) == 1 else "tie"


def _others(label: str, answers: int) -> list[str]:
    return [other for other in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:answers] if other != label]


BOTH_ORDERS = Rule(
    both_orders, "right if one order names the right answer and the other names it too, ties or is unread"
)
EACH_ORDER = Rule(each_order, "mean over both orders; ties and unread replies are wrong")
BEST_OF_MANY = Rule(best_of_many, "the right one of several answers; tied answers share, an unread reply ties all")
HUMAN_LABEL = Rule(human_label, "the people's label of three, A, B or tie; orders that differ are a tie")
HUMAN_VOTES = Rule(human_votes, "the chance that one of the people agrees; orders that differ are a tie")
