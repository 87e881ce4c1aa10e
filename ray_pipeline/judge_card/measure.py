"""The figures of a judge card, from the tables of its items and verdicts."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from ray_pipeline.engines.usage import Usage
from ray_pipeline.judge_card.probes import CONTROL, ORDER, PLAIN, PROBES
from ray_pipeline.judge_card.rules import BOTH_ORDERS, Rule
from ray_pipeline.judge_card.sets import SETS
from ray_pipeline.stats.bootstrap import Interval, bootstrap_gain, bootstrap_mean

#: The score of replies that could be read, and the texts of scores that follow from no rule of a set.
READ = "read"
_ORDER_RULE = "of the plain pairs that were read in both orders, the share without two different winners"
_READ_RULE = "of all verdicts, the share that could be read"


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure of a judge, from 0 to 1; more is better.

    Attributes:
        title: its name on pages.
        share: with its interval; `rows` are items, and `groups` the questions that are resampled.
        unread: share of the verdicts that could not be read.
        effect: of a probe: accuracy with it minus accuracy without it, on the same pairs.
        subsets: subset → accuracy.
    """

    name: str
    title: str
    kind: Literal["set", "probe", "replies"]
    rule: str
    share: Interval
    unread: float | None = None
    effect: Interval | None = None
    subsets: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class JudgeFacts:
    """Who a judge is.

    Attributes:
        model: display name of its model.
        identity: of the model's weights, by which a run finds the card.
        family: of the model, as the probe `self_family` names it.
        protocol: strategies, templates and rubric, in words.
    """

    judge: str
    model: str
    identity: Mapping[str, str]
    family: str
    protocol: str

    @property
    def base(self) -> str:
        """The model without its adapter: models of one base share an engine."""
        return self.identity["model"]


@dataclasses.dataclass(frozen=True)
class JudgeCard:
    """All scores of one judge, and what a thousand of its calls took; None where all were in the call log.

    Attributes:
        seconds_per_1000: time that its engine was held, without its start; at an endpoint time on the clock.
        cost_per_1000: in the currency of the prices; None without prices.
    """

    facts: JudgeFacts
    scores: Sequence[Score]
    seconds_per_1000: float | None
    cost_per_1000: float | None


@dataclasses.dataclass(frozen=True)
class _Judged:
    """An item with a judge's verdicts on it, by the order in which the answers were shown."""

    row: Mapping[str, Any]
    verdicts: Mapping[str, str | None]

    def credit(self, rule: Rule) -> float:
        return rule.credit(list(self.verdicts.values()), self.row["votes"], len(self.row["answers"]))

    @property
    def contradictory(self) -> bool | None:
        """Whether two orders have different winners; None unless several orders were read."""
        read = [best for best in self.verdicts.values() if best is not None]
        if len(read) < 2 or len(read) < len(self.verdicts):
            return None
        return len({best for best in read if len(best) == 1}) > 1 and all(len(best) == 1 for best in read)


def judge_card(
    facts: JudgeFacts,
    items: pa.Table,
    verdicts: pa.Table,
    usage: Usage,
    engine: Usage,
    draws: int = 2000,
    seed: int = 0,
) -> JudgeCard:
    """The card of one judge.

    Args:
        items: schema CARD_ITEMS.
        verdicts: schema CARD_VERDICTS, of all judges.
        usage: of the stage that asked the judge; judges on one model share it.
        engine: of all stages on the engine; one of them has the time of its start.
    """
    found: dict[str, dict[str, str | None]] = collections.defaultdict(dict)
    for row in verdicts.select(["item_id", "judge", "order", "best"]).to_pylist():
        if row["judge"] == facts.judge:
            found[row["item_id"]][row["order"]] = row["best"]
    judged = [_Judged(row, found[row["item_id"]]) for row in items.to_pylist() if row["item_id"] in found]
    judged.sort(key=lambda one: str(one.row["item_id"]))
    by_source: dict[str, list[_Judged]] = collections.defaultdict(list)
    for one in judged:
        by_source[one.row["source"]].append(one)
    scores = [_set_score(name, by_source[name], draws, seed) for name in SETS if name in by_source]
    scores += _probe_scores(by_source.get(PROBES, []), draws, seed)
    read = [(float(best is not None), one.row["prompt_id"]) for one in judged for best in one.verdicts.values()]
    if read:
        scores.append(Score(READ, "read replies", "replies", _READ_RULE, _mean(read, draws, seed), _unread(judged)))
    busy = engine.device_seconds - engine.start_seconds or engine.wall_seconds
    return JudgeCard(
        facts,
        scores,
        1000 * busy / engine.calls_engine if engine.calls_engine else None,
        1000 * usage.cost / usage.calls_engine if usage.calls_engine and usage.cost else None,
    )


def _set_score(name: str, judged: Sequence[_Judged], draws: int, seed: int) -> Score:
    form = SETS[name]
    credits = [one.credit(form.rule) for one in judged]
    questions = [one.row["prompt_id"] for one in judged]
    by_subset: dict[str, list[float]] = collections.defaultdict(list)
    for one, credit in zip(judged, credits, strict=True):
        by_subset[one.row["subset"] or ""].append(credit)
    if form.by_subset:
        # Weights that make the mean over items the mean over subsets.
        weight = {subset: len(judged) / (len(by_subset) * len(of)) for subset, of in by_subset.items()}
        credits = [credit * weight[one.row["subset"] or ""] for one, credit in zip(judged, credits, strict=True)]
    bounds = None if form.by_subset else (0.0, 1.0)
    share = bootstrap_mean(credits, questions, draws, seed, bounds=bounds)
    means = {subset: sum(of) / len(of) for subset, of in sorted(by_subset.items())}
    return Score(
        name, form.title, "set", form.rule.text, share, _unread(judged), subsets=means if len(means) > 1 else {}
    )


def _probe_scores(judged: Sequence[_Judged], draws: int, seed: int) -> list[Score]:
    by_probe: dict[str, dict[str, _Judged]] = collections.defaultdict(dict)
    for one in judged:
        by_probe[one.row["subset"]][one.row["base"]] = one
    scores = []
    for name, of_pair in by_probe.items():
        if name.endswith(CONTROL):
            continue
        credits = {base: one.credit(BOTH_ORDERS) for base, one in of_pair.items()}
        without = by_probe.get(name + CONTROL) or (by_probe[PLAIN] if name != PLAIN else {})
        effect = None
        if without:
            plain = {base: one.credit(BOTH_ORDERS) for base, one in without.items()}
            effect = bootstrap_gain(
                list(plain.values()),
                list(plain),
                list(credits.values()),
                list(credits),
                draws,
                seed,
                bounds=(-1.0, 1.0),
            )
        share = _mean([(credit, base) for base, credit in credits.items()], draws, seed)
        scores.append(
            Score(name, name.replace("_", " "), "probe", BOTH_ORDERS.text, share, _unread(of_pair.values()), effect)
        )
    consistent = [
        (float(not one.contradictory), base) for base, one in by_probe[PLAIN].items() if one.contradictory is not None
    ]
    if consistent:
        scores.append(Score(ORDER, ORDER, "probe", _ORDER_RULE, _mean(consistent, draws, seed)))
    order = [PLAIN, ORDER]
    return sorted(
        scores, key=lambda score: (order.index(score.name) if score.name in order else len(order), score.name)
    )


def _mean(values: Sequence[tuple[float, str]], draws: int, seed: int) -> Interval:
    numbers, groups = zip(*values, strict=True)
    return bootstrap_mean(numbers, groups, draws, seed, bounds=(0.0, 1.0))


def _unread(judged: Iterable[_Judged]) -> float:
    verdicts = [best for one in judged for best in one.verdicts.values()]
    return sum(best is None for best in verdicts) / len(verdicts)
