"""All numbers of agreement.json, computed from the tables `items` and `ballots`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.agents.jury import (
    MISSING,
    VOTE_RULES,
    VOTES,
    Codes,
    compare_scores,
    jury_names,
    pool_scores,
    pool_votes,
    subsets,
)
from ray_pipeline.agreement.cascade import Cascade, cascade, check_names
from ray_pipeline.agreement.humans import Ceiling, alpha_of_many, human_ceiling
from ray_pipeline.agreement.measure_settings import LATENT, MeasureSettings
from ray_pipeline.agreement.panel import DebateRule, Evaluator, Panel, family, flips, longer_side, make_panel, own_side
from ray_pipeline.agreement.pools import PoolLine, compare_pools, latent_votes
from ray_pipeline.agreement.powered import PoweredLine, powered_lines
from ray_pipeline.agreement.preference import Preference, first_place, preference
from ray_pipeline.agreement.vote_agreement import Agreement, HeldOut, Paired, agreement, held_out_choice, paired
from ray_pipeline.stats.bootstrap import Estimate, Samples, ratio, resample
from ray_pipeline.store.keys import unit_hash


@dataclasses.dataclass(frozen=True)
class Judged:
    """One judge under one strategy, or one debater."""

    strategy: str
    judge: str
    parse_status: dict[str, int]
    agreement: Agreement
    flip_rate: Estimate


@dataclasses.dataclass(frozen=True)
class JuryResult:
    strategy: str
    jury: tuple[str, ...]
    agreement: Agreement


@dataclasses.dataclass(frozen=True)
class Debate:
    """A debate by both rules: the one that counts, the other, and each voice by itself."""

    debater: str
    rule: DebateRule
    other_rule_kappa: Estimate
    voices: dict[str, Agreement]
    judged: Judged


@dataclasses.dataclass(frozen=True)
class Bias:
    """A judge's preferences beside quality. Its family is that of its model if known, else of its name."""

    strategy: str
    judge: str
    model: str | None
    longer: Preference | None
    first: Preference | None
    own_family: Preference | None


@dataclasses.dataclass(frozen=True)
class AmongJudges:
    """How far the judges of a strategy agree with each other: kappa by pair with its interval, and alpha over all."""

    strategy: str
    judges: list[str]
    kappas: list[list[float | None]]
    intervals: list[list[tuple[float | None, float | None]]]
    alpha: Estimate


@dataclasses.dataclass(frozen=True)
class Document:
    """All numbers of an agreement run.

    Attributes:
        posteriors: of each strategy's whole panel, by pool and item (`compare_pools`).
    """

    items: int
    labelled: int
    label_counts: dict[str, int]
    judges: list[Judged]
    juries: list[JuryResult]
    debates: list[Debate]
    bias: list[Bias]
    among_judges: list[AmongJudges]
    paired: list[Paired]
    held_out: list[HeldOut]
    pools: list[PoolLine]
    cascades: list[Cascade]
    powered: list[PoweredLine]
    posteriors: list[pa.Table]
    humans: Ceiling | None


def choosing_half(panel: Panel, settings: MeasureSettings) -> NDArray[np.bool_]:
    """Items on which a jury is chosen, shape (items,); the others are held out. All items of a question are on one
    side, by the hash of the first of them."""
    first: dict[str, str] = {}
    for item, question in sorted(zip(panel.item_ids, panel.questions, strict=True)):
        first.setdefault(question, item)
    hashes = [unit_hash("held-out", settings.seed, first[question]) for question in panel.questions]
    return np.array([each < settings.held_out for each in hashes])


def measure(
    items: pa.Table, ballots: pa.Table, settings: MeasureSettings, models: Mapping[str, str] | None = None
) -> Document:
    """All statistics that the tables allow.

    Args:
        models: judge or debater → name of its model, if known.

    Raises:
        ValueError: the tables do not fit together.
    """
    panel = make_panel(items, ballots, settings.conflict, settings.debate, settings.families)
    samples = resample(panel.questions, settings.draws, settings.seed, settings.confidence)
    choose_on = choosing_half(panel, settings)
    judged = _judged(panel, samples, settings)
    other = _by_other_rule(items, ballots, samples, settings)
    juries: list[JuryResult] = []
    among, chosen, pools, posteriors, cascades, powered = [], [], [], [], [], []
    check_names(settings.cascade, panel)
    families = {e.judge: family((models or {}).get(e.judge) or e.judge, settings.families) for e in panel.evaluators}
    pairs = _pairs([e for e in panel.evaluators if e.strategy != "versus"], panel.labels, samples)
    for strategy in panel.strategies:
        own = panel.of(strategy)
        if strategy in ("debate", "versus") or len(own) < 2:
            continue
        results, votes = _juries(strategy, own, panel.labels, samples, settings)
        juries += results
        among.append(_among(strategy, own, samples))
        pairs += _with_jury(results, own, votes, panel.labels, samples)
        lines, by_item = compare_pools(strategy, own, panel, settings, samples, families)
        pools += lines
        posteriors.append(by_item)
        powered += powered_lines(strategy, own, panel, settings.confidence)
        cascades.append(cascade(strategy, own, panel, choose_on, settings.cascade, samples))
        found = held_out_choice(votes, panel.labels, choose_on, samples)
        if found is not None:
            chosen.append(dataclasses.replace(found, chosen=f"{strategy}: {found.chosen}"))
    return Document(
        items=len(panel.item_ids),
        labelled=int((panel.labels != MISSING).sum()),
        label_counts={vote: int((panel.labels == code).sum()) for code, vote in enumerate(VOTES)},
        judges=[j for j in judged if j.strategy != "debate"],
        juries=juries,
        debates=_debates(panel, [j for j in judged if j.strategy == "debate"], other, samples, settings),
        bias=[_bias(panel, e, (models or {}).get(e.judge), families[e.judge], samples) for e in panel.evaluators],
        among_judges=among,
        paired=pairs,
        held_out=chosen,
        pools=pools,
        cascades=[one for one in cascades if one is not None],
        powered=powered,
        posteriors=posteriors,
        humans=human_ceiling(panel.human_votes, samples) if len(panel.human_votes) else None,
    )


def _judged(panel: Panel, samples: Samples, settings: MeasureSettings) -> list[Judged]:
    if not panel.evaluators:
        return []
    votes = np.stack([e.votes for e in panel.evaluators])
    found = agreement(votes, panel.labels, samples)
    return [
        Judged(e.strategy, e.judge, e.statuses, result, _flip_rate(e, samples, settings))
        for e, result in zip(panel.evaluators, found, strict=True)
    ]


def _flip_rate(evaluator: Evaluator, samples: Samples, settings: MeasureSettings) -> Estimate:
    found = flips(evaluator)
    if found is None:
        return Estimate(None)
    return ratio(found[0].astype(float), found[1].astype(float), samples)


def _juries(
    strategy: str, judges: Sequence[Evaluator], labels: Codes, samples: Samples, settings: MeasureSettings
) -> tuple[list[JuryResult], dict[str, Codes]]:
    """Every jury's agreement, and the votes of juries and single judges by name, for the held-out choice."""
    rules, names = settings.juries, [e.judge for e in judges]
    sizes = [s for s in (rules.sizes or range(2, len(judges) + 1)) if s <= len(judges)]
    _check_size(len(judges), sizes, rules.most)
    members = subsets(len(judges), sizes)
    weights = None
    if rules.weights:
        if lacking := [name for name in names if name not in rules.weights]:
            raise ValueError(f"juries.weights has no weight for {', '.join(lacking)}")
        weights = [rules.weights[name] for name in names]
    codes = np.stack([e.votes for e in judges])
    if rules.pool == "dawid_skene" or rules.pool == "one_coin":
        votes = np.stack([latent_votes(codes[chosen], rules.pool)[0] for chosen in members])
    elif rules.pool in VOTE_RULES:
        votes = pool_votes(codes, members, weights)
    else:
        if unscored := [e.judge for e in judges if e.scores is None]:
            raise ValueError(
                f"juries.pool {rules.pool} pools scores, and {strategy} has none of {', '.join(unscored)}; "
                f"use {', '.join((*VOTE_RULES, *LATENT))}"
            )
        scores = np.stack([e.scores for e in judges if e.scores is not None], axis=1)
        votes = compare_scores(*pool_scores(scores, members, rules.pool, weights))
    found = agreement(votes, labels, samples)
    named = list(jury_names(names, members))
    results = [JuryResult(strategy, jury, result) for jury, result in zip(named, found, strict=True)]
    candidates = {name: e.votes for name, e in zip(names, judges, strict=True)}
    candidates |= {" + ".join(jury): row for jury, row in zip(named, votes, strict=True)}
    return results, candidates


def _check_size(judges: int, sizes: Sequence[int], most: int) -> None:
    count = 0
    for size in sizes:
        ways = 1
        for i in range(size):
            ways = ways * (judges - i) // (i + 1)
        count += ways
    if count > most:
        raise ValueError(
            f"{judges} judges have {count:,} juries of these sizes, and juries.most is {most:,}; "
            "name fewer juries.sizes or raise juries.most"
        )


def _among(strategy: str, judges: Sequence[Evaluator], samples: Samples) -> AmongJudges:
    votes = np.stack([e.votes for e in judges])
    found = [[result.estimates["kappa"] for result in agreement(votes, own, samples, ("kappa",))] for own in votes]
    return AmongJudges(
        strategy=strategy,
        judges=[e.judge for e in judges],
        kappas=[[kappa.value for kappa in row] for row in found],
        intervals=[[(kappa.low, kappa.high) for kappa in row] for row in found],
        alpha=alpha_of_many(votes, samples),
    )


def _pairs(evaluators: Sequence[Evaluator], labels: Codes, samples: Samples) -> list[Paired]:
    """Judges of one strategy with each other, and each judge's strategies with each other."""
    if not (labels != MISSING).any():
        return []
    return [
        paired(
            (f"{one.strategy}: {one.judge}", one.votes),
            (f"{other.strategy}: {other.judge}", other.votes),
            labels,
            samples,
        )
        for one, other in itertools.combinations(evaluators, 2)
        if one.strategy == other.strategy or one.judge == other.judge
    ]


def _with_jury(
    juries: Sequence[JuryResult],
    judges: Sequence[Evaluator],
    votes: Mapping[str, Codes],
    labels: Codes,
    samples: Samples,
) -> list[Paired]:
    """The largest jury that was measured, the first of those of its size, with each of its members.

    It is chosen by its size and not by its kappa: tests of the best of many juries would flatter it.
    """
    several = [j for j in juries if len(j.jury) > 1]
    if not several or not (labels != MISSING).any():
        return []
    largest = max(several, key=lambda j: len(j.jury))
    name = " + ".join(largest.jury)
    return [
        paired((f"{j.strategy}: {name}", votes[name]), (f"{j.strategy}: {j.judge}", j.votes), labels, samples)
        for j in judges
        if j.judge in largest.jury
    ]


def _debates(
    panel: Panel,
    judged: Sequence[Judged],
    other: Mapping[str, Estimate],
    samples: Samples,
    settings: MeasureSettings,
) -> list[Debate]:
    debates = []
    for result in judged:
        voices = panel.voices.get(result.judge, {})
        votes = [voice.votes for voice in voices.values()]
        found = agreement(np.stack(votes), panel.labels, samples) if votes else []
        own = dict(zip(voices, found, strict=True))
        debates.append(Debate(result.judge, settings.debate, other.get(result.judge, Estimate(None)), own, result))
    return debates


def _by_other_rule(
    items: pa.Table, ballots: pa.Table, samples: Samples, settings: MeasureSettings
) -> dict[str, Estimate]:
    """Kappa of every debate by the rule that was not chosen; none where it needs scores that a voice does not give."""
    other: DebateRule = "vote" if settings.debate == "mean" else "mean"
    panel = make_panel(items, ballots.filter(pc.equal(ballots["strategy"], "debate")), settings.conflict, other)
    kappas: dict[str, Estimate] = {}
    for debate in panel.evaluators:
        voices = panel.voices.get(debate.judge, {}).values()
        if voices and (other == "vote" or all(voice.scores is not None for voice in voices)):
            (found,) = agreement(debate.votes[None], panel.labels, samples, ("kappa",))
            kappas[debate.judge] = found.estimates["kappa"]
    return kappas


def _bias(panel: Panel, evaluator: Evaluator, model: str | None, own: str | None, samples: Samples) -> Bias:
    return Bias(
        evaluator.strategy,
        evaluator.judge,
        model,
        longer=preference(evaluator.votes, panel.labels, longer_side(panel), samples),
        first=first_place(evaluator.ab, evaluator.ba, panel.labels, samples),
        own_family=preference(evaluator.votes, panel.labels, own_side(panel, own), samples),
    )


def as_document(found: Document, settings: MeasureSettings, about: Mapping[str, Any]) -> dict[str, Any]:
    """agreement.json as plain data: n, kappa and interval are flat keys of each row."""
    return {
        **about,
        "settings": settings.model_dump(mode="json"),
        "items": found.items,
        "labelled": found.labelled,
        "label_counts": found.label_counts,
        "judges": [_flat_judged(j) for j in found.judges],
        "juries": [{"strategy": j.strategy, "jury": list(j.jury), **_flat(j.agreement)} for j in found.juries],
        "debates": [
            {
                "debater": d.debater,
                "rule": d.rule,
                "other_rule_kappa": d.other_rule_kappa.value,
                "other_rule_kappa_interval": [d.other_rule_kappa.low, d.other_rule_kappa.high],
                **{k: v for k, v in _flat_judged(d.judged).items() if k != "judge"},
                "voices": {role: _flat(result) for role, result in d.voices.items()},
            }
            for d in found.debates
        ],
        "bias": [dataclasses.asdict(b) for b in found.bias],
        "among_judges": [dataclasses.asdict(a) for a in found.among_judges],
        "paired": [dataclasses.asdict(p) for p in found.paired],
        "held_out": [dataclasses.asdict(h) for h in found.held_out],
        "pools": [dataclasses.asdict(p) for p in found.pools],
        "cascades": [dataclasses.asdict(c) for c in found.cascades],
        "powered": [dataclasses.asdict(p) for p in found.powered],
        "humans": None if found.humans is None else dataclasses.asdict(found.humans),
    }


def _flat_judged(judged: Judged) -> dict[str, Any]:
    return {
        "strategy": judged.strategy,
        "judge": judged.judge,
        **_flat(judged.agreement),
        "parse_status": judged.parse_status,
        "flip_rate": dataclasses.asdict(judged.flip_rate),
    }


def _flat(found: Agreement) -> dict[str, Any]:
    kappa = found.estimates["kappa"]
    return {
        "n": found.n,
        "labelled": found.labelled,
        "missing": found.missing,
        "vote_counts": found.vote_counts,
        "kappa": kappa.value,
        "kappa_interval": [kappa.low, kappa.high],
        **{name: dataclasses.asdict(e) for name, e in found.estimates.items() if name != "kappa"},
        "kappa_bounds": [found.worst["kappa"], found.best["kappa"]],
        "accuracy_bounds": [found.worst["accuracy"], found.best["accuracy"]],
    }
