"""Posteriors in the decisions (`gate.pool`), and the gate that decides by them (`kind: posterior`).

A judge's vote is undesirable with a score up to `undesirable_at`, desirable with one from `desirable_at`, else discard.
A latent class model of all candidates' votes (`stats.posterior`) gives each candidate a probability P of each; what was
not read is no vote. With penalty = α·p, where p is 1 if the critic calls the candidate flawed, else 0, and the first
line that fits, `kind: posterior` decides:

    the text was cut off, or a score or the critique was not read    incomplete
    P(undesirable) ≥ posterior_at                                    undesirable
    P(desirable) · (1 − penalty) ≥ posterior_at                      desirable
    P(desirable) or P(discard) ≥ posterior_at                        discard
    otherwise                                                        abstain

The numbers are those of the published gate, so pairs are ranked by the same final score.

Where judges were skipped (`judge.escalate`), their votes are missing. The model is fitted to the votes that there are:
whether a judge was asked follows from votes that were cast, so the gaps need no model of their own. How far judges err
together is taken from the audit slice, on which all were asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.early_exit import slice_of
from ray_pipeline.data.gate import Floats, GateConfig, label_counts, read_scores, with_nulls
from ray_pipeline.data.judge_votes import BETWEEN, DESIRABLE, UNDESIRABLE, by_role, vote_classes
from ray_pipeline.data.reviewed import HumanLabels, overrule
from ray_pipeline.data.rows import one_array
from ray_pipeline.graph.stage import Stage, StageRef, WholeInput, WholeWork
from ray_pipeline.report.figures import number, percent, span
from ray_pipeline.report.page import Rows, Section, Table, Text
from ray_pipeline.stats.judge_errors import GROUPS, count_votes
from ray_pipeline.stats.latent_class import FEWEST, MISSING, LatentClasses, Votes
from ray_pipeline.stats.posterior import NEARLY_ONE, TOGETHER, PanelPosterior, fit_posterior, posterior_of
from ray_pipeline.store.keys import bucket_of
from ray_pipeline.store.schemas import POOLED_DECISIONS

#: Labels by class of votes, and their columns.
CLASS_LABELS = {UNDESIRABLE: "undesirable", BETWEEN: "discard", DESIRABLE: "desirable"}
COLUMNS = {code: f"posterior_{label}" for code, label in CLASS_LABELS.items()}
#: Pairs of judges named in a warning.
_SHOWN = 3
#: Probabilities are rounded to so many digits, so that the audit's arithmetic gives the same labels.
DIGITS = 9


class _PosteriorGiven(Settings):
    gate: GateConfig
    judges: tuple[str, ...]
    humans: HumanLabels | None = None
    skipped: bool = False


def posterior_stage(
    gate: GateConfig,
    judges: Sequence[str],
    numbers: Stage,
    verdicts: Sequence[Stage],
    humans: HumanLabels | None,
    *,
    name: str,
    skipped: bool = False,
) -> Stage:
    """The decisions of a gate with a pool.

    Args:
        numbers: decisions of the published gate with the same thresholds.
        humans: labels by people that replace the gate's.
        skipped: not every judge was asked about every candidate.

    Raises:
        InputError: the labels cannot be read.
    """
    given = _PosteriorGiven(gate=gate, judges=tuple(judges), humans=humans, skipped=skipped)
    return Stage(
        name=name,
        version=2,  # 2: two judges who differ have one accuracy
        group="gate",
        role="decisions",
        work=WholeWork(function=posterior_run, settings=given, tables=("pooled_decisions",)),
        config=given.decisive(exclude={"humans"}),
        inputs={"numbers": numbers, **by_role(verdicts)},
        external={} if humans is None else humans.digest(),
    )


def posterior_run(given: WholeInput) -> dict[str, Any]:
    """Fit the model to the votes of all shards, then write each shard. Votes, a byte each, are in memory for all."""
    settings: _PosteriorGiven = given.settings
    numbers, judges = given.inputs["numbers"].table(), list(settings.judges)
    model, votes = fitted(given, "numbers", judges, settings.gate, settings.skipped)
    ref = StageRef("gate", given.fingerprint, given.folder.location, given.num_shards, ("pooled_decisions",))
    people = None if settings.humans is None else settings.humans.read().labels
    labels: dict[str, int] = {}
    changed = 0
    for shard in range(given.num_shards):
        table = decided(numbers.read(shard), model.posterior(votes[shard]), settings.gate)
        if people is not None:
            table, more = overrule(table, people)
            changed += more
        ref.table().write(shard, table)
        labels = {label: labels.get(label, 0) + count for label, count in label_counts(table).items()}
        given.tick(shard + 1, given.num_shards, "shards")
    facts = model_facts(model, judges)
    given.log(f"posterior: {effective_text(facts)}")
    for line in warnings(facts):
        given.log(line)
    return {"counts": labels | ({} if people is None else {"changed_by_people": changed}), "posterior": facts}


def fitted(
    given: WholeInput, keyed: str, judges: Sequence[str], gate: GateConfig, skipped: bool
) -> tuple[PanelPosterior, list[Votes]]:
    """The model of the votes of all shards, and these votes by shard, each of shape (candidates, judges).

    Args:
        given: its inputs `verdicts/…` hold the verdicts.
        keyed: the input with one row for each candidate.
        skipped: not every judge was asked about every candidate.
    """
    votes, groups, whole = [], [], []
    for shard in range(given.num_shards):
        rows = given.inputs[keyed].table().read(shard, ["candidate_id", "prompt_id"])
        ids = one_array(rows["candidate_id"])
        scores, _ = read_scores(verdicts_of(given, shard, ids), ids, list(judges))
        votes.append(vote_classes(scores, (gate.undesirable_at, gate.desirable_at)))
        groups += [bucket_of(prompt) % GROUPS for prompt in rows["prompt_id"].to_pylist()]
        whole.append(np.asarray(slice_of(rows)) if skipped else np.full(len(ids), True))
    every, unknown, group = np.concatenate(votes), np.full(len(groups), MISSING, np.int8), np.array(groups, np.int64)
    asked = np.concatenate(whole)
    counts = count_votes(every, unknown, group)
    of_whole = count_votes(every[asked], unknown[asked], group[asked]) if skipped else None
    model = fit_posterior(judges, counts, len(CLASS_LABELS), one_coin=gate.pool == "one_coin", whole=of_whole)
    return model, votes


def verdicts_of(given: WholeInput, shard: int, ids: pa.Array) -> pa.Table:
    """Verdicts of one shard on these candidates, of all inputs `verdicts/…`; a gate may take fewer than were judged."""
    columns = ["candidate_id", "judge", "score", "parse_status"]
    stages = [result for role, result in sorted(given.inputs.items()) if role.startswith("verdicts/")]
    verdicts = pa.concat_tables([stage.table().read(shard, columns) for stage in stages])
    return verdicts.filter(pc.is_in(verdicts["candidate_id"], value_set=ids))


def decided(decisions: pa.Table, posterior: Floats, gate: GateConfig) -> pa.Table:
    """Decisions of the published gate with posteriors and, for kind posterior, its labels: schema POOLED_DECISIONS.

    Args:
        posterior: of each class, shape (decisions, 3); NaN in rows without a vote.
    """
    posterior = posterior.round(DIGITS)
    columns = {name: decisions[name] for name in decisions.column_names}
    columns |= {name: with_nulls(posterior[:, code]) for code, name in COLUMNS.items()}
    if gate.kind == "posterior":
        columns |= _labels(decisions, posterior, gate)
    return pa.table([columns[name] for name in POOLED_DECISIONS.names], schema=POOLED_DECISIONS)


def _labels(decisions: pa.Table, posterior: Floats, gate: GateConfig) -> dict[str, pa.Array]:
    at, penalty = gate.posterior_at, decisions["penalty"].to_numpy(zero_copy_only=False)
    kept = posterior[:, DESIRABLE] * (1.0 - penalty)
    best = np.nan_to_num(posterior).argmax(axis=1)
    most = np.take_along_axis(posterior, best[:, None], axis=1)[:, 0]
    cases: dict[str, tuple[NDArray[Any], Floats, str]] = {
        "undesirable": (
            posterior[:, UNDESIRABLE] >= at,
            posterior[:, UNDESIRABLE],
            f"P(undesirable) {{:.4f}} ≥ {at:g}",
        ),
        "desirable": (kept >= at, kept, f"P(desirable) {{:.4f}} ≥ {at:g}"),
        "flawed": (posterior[:, DESIRABLE] >= at, kept, f"P(desirable) {{:.4f}} < {at:g} after the critic"),
        "discard": (posterior[:, BETWEEN] >= at, posterior[:, BETWEEN], f"P(discard) {{:.4f}} ≥ {at:g}"),
        "abstain": (np.full(len(kept), True), most, f"no label at {at:g}, the most probable has {{:.4f}}"),
    }
    case = np.select([mask for mask, _, _ in cases.values()], range(len(cases)))
    names = ["discard" if name == "flawed" else name for name in cases]
    shown = np.choose(case, [value for _, value, _ in cases.values()]).tolist()
    texts = [text for _, _, text in cases.values()]
    why = [texts[at].format(value) for at, value in zip(case.tolist(), shown, strict=True)]
    complete = pc.and_(pc.not_equal(decisions["label"], "incomplete"), decisions["final_score"].is_valid())
    return {
        "label": pc.if_else(complete, pa.array(names).take(pa.array(case)), decisions["label"]),
        "why": pc.if_else(complete, pa.array(why, pa.string()), decisions["why"]),
    }


# --- what the model found ---------------------------------------------------------------------------------------------


def model_facts(model: PanelPosterior, judges: Sequence[str]) -> dict[str, Any]:
    """A model as plain data, with the judges by name."""
    return {
        "groups": [[judges[place] for place in group] for group in model.groups],
        "prior": model.model.prior.tolist(),
        "errors": model.model.errors.tolist(),
        "effective": model.effective,
        "power": model.power,
        "correlation": model.errors.correlation.mean,
        "rows": model.rows,
        "whole": model.errors.rows,
        "right": {one.judge: one.accuracy.mean for one in model.errors.judges},
        "pairs": [dataclasses.asdict(pair) for pair in model.errors.pairs],
    }


def stored_posterior(facts: Mapping[str, Any], judges: Sequence[str], votes: Votes) -> Floats:
    """Probability of each class by a model that is stored as `model_facts`, as `PanelPosterior.posterior`.

    Args:
        judges: whose votes are given; those of other judges are missing.
        votes: shape (rows, judges).
    """
    every = [name for group in facts["groups"] for name in group]
    cast = np.full((len(votes), len(every)), MISSING, np.int8)
    cast[:, [every.index(judge) for judge in judges]] = votes
    groups = [[every.index(name) for name in group] for group in facts["groups"]]
    model = LatentClasses(np.array(facts["prior"]), np.array(facts["errors"]))
    return posterior_of(cast, groups, model, facts["power"])


def effective_text(facts: Mapping[str, Any]) -> str:
    """How many independent judges the panel counts as, without a full stop."""
    judges = sum(map(len, facts["groups"]))
    r = "unknown" if facts["correlation"] is None else f"{facts['correlation']:.2f}"
    return f"{judges} judges count as {facts['effective']:.1f} independent ones (mean correlation of errors {r})"


def warnings(facts: Mapping[str, Any]) -> Iterator[str]:
    """Judges who are nearly one, who err together, and too few of them."""
    yield from dependent(facts)
    if len(facts["groups"]) < FEWEST:
        yield (
            f"Only {len(facts['groups'])} judges are left who differ: nothing shows who of them is right, and the "
            f"posterior is hardly more than a convention; it needs {FEWEST}."
        )


def dependent(facts: Mapping[str, Any]) -> Iterator[str]:
    """Judges who are nearly one, and who err together."""
    for group in facts["groups"]:
        if len(group) > 1:
            yield (
                f"Judges {' and '.join(group)} are nearly one (kappa above {NEARLY_ONE:g}): the posterior counts them "
                "as one judge; remove all but one, or replace them by judges who err differently."
            )
    together = sorted(filter(_together, facts["pairs"]), key=lambda pair: -pair["correlation"]["mean"])
    if together:
        shown = [f"{pair['judge_a']} and {pair['judge_b']} ({pair['correlation']['mean']:.2f})" for pair in together]
        more = len(shown) - _SHOWN
        yield (
            f"Judges err together: {', '.join(shown[:_SHOWN])}{f' and {more} other pairs' if more > 0 else ''} "
            "(estimated correlation of errors). Each is worth less than an independent judge."
        )


def _together(pair: Mapping[str, Any]) -> bool:
    return (pair["correlation"]["low"] or 0.0) > TOGETHER


def posterior_section(facts: Mapping[str, Any] | None, gate: GateConfig) -> Section | None:
    """None for a gate without a pool."""
    if facts is None:
        return None
    use = "decides" if gate.kind == "posterior" else "is in the decisions and decides nothing"
    text = (
        f"{effective_text(facts)}, by a latent class model ({gate.pool}) of the votes on {number(facts['rows'])} "
        f"candidates, without labels; the posterior {use}. The likelihood of a row of votes "
        f"is raised to {facts['power']:.2f}, so that votes weigh as much as those of so many independent judges. "
        f"{_of_slice(facts)}What "
        "most judges share is the truth to the model: with errors that all share, the posterior is too sure."
    )
    rows: Rows = [
        [" = ".join(group), percent(facts["right"].get(group[0])), *(percent(1 - errors[c][c]) for c in CLASS_LABELS)]
        for group, errors in zip(facts["groups"], facts["errors"], strict=True)
    ]
    judges = Table(["judge", "right (estimate)", *(f"wrong where {label}" for label in CLASS_LABELS.values())], rows)
    test: Rows = [
        [
            f"{pair['judge_a']} and {pair['judge_b']}",
            number(pair["correlation"]["mean"]),
            span(pair["correlation"]["low"], pair["correlation"]["high"]),
            "yes" if _together(pair) else "no",
        ]
        for pair in facts["pairs"]
    ]
    note = (
        f"Two judges err together where the 95 % interval lies above {TOGETHER:g}; intervals by a jackknife over "
        "groups of prompts, without the error of the model."
    )
    columns = ["pair", "correlation of errors (estimate)", "95 %", f"above {TOGETHER:g}"]
    return Section("posterior", "The posterior of the panel", [Text(text), judges, Text(note), Table(columns, test)])


def _of_slice(facts: Mapping[str, Any]) -> str:
    """On which candidates errors are estimated, where not every judge was asked about every candidate."""
    whole = facts.get("whole", facts["rows"])
    if whole == facts["rows"]:
        return ""
    return f"How often judges are right, and err together, is estimated on the {number(whole)} of the audit slice. "
