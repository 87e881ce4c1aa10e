"""Curves over the rounds of a run: what each policy can do, how its answers change, and signs of reward hacking."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.data.checkers import with_truth
from ray_pipeline.graph.results import of_role, table_of
from ray_pipeline.graph.stage import StageResult
from ray_pipeline.policy.comparisons import pair_id
from ray_pipeline.policy.response_stats import ResponseStats, response_means, response_stats
from ray_pipeline.policy.train import METRICS
from ray_pipeline.policy.training_curve import summarise_training
from ray_pipeline.report.charts import Chart, Series, lines
from ray_pipeline.report.figures import number, percent, percent_interval, signed
from ray_pipeline.report.page import Block, Rows, Section, Table, Text, panels
from ray_pipeline.stats.bootstrap import Interval, bootstrap_mean
from ray_pipeline.stats.columns import count_values
from ray_pipeline.stats.winrate import win_rates
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import normalise_text
from ray_pipeline.store.schemas import TRAIN_METRICS


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The policy of a round on held-out prompts.

    Attributes:
        policy, base: their responses, by mode.
        scores: judge of the comparisons → score against the base.
        panel: share of the prompts on which the rubric judges' mean score prefers the policy to the base, ties half, in
            the mode that is compared; None without rubric judges.
    """

    policy: Sequence[ResponseStats]
    base: Sequence[ResponseStats]
    scores: Mapping[str, Interval]
    panel: Interval | None

    @property
    def score(self) -> float | None:
        """By the first judge of the comparisons."""
        return next((score.mean for score in self.scores.values()), None)

    @property
    def accuracy(self) -> float | None:
        """True accuracy of the policy, the mean over modes."""
        known = [stats.accuracy.mean for stats in self.policy if stats.accuracy and stats.accuracy.mean is not None]
        return float(np.mean(known)) if known else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundStats(HeldOut):
    """One round: its data, from the policy before it, and the policy that it trains.

    Attributes:
        candidates: answers drawn; `kept` is the share of them that is desirable or undesirable, `desirable` the share
            that is desirable.
        distinct: different answers to a prompt as a share of its answers, the mean over prompts.
        rows: training rows by kind.
        kl: KL to the reference as the method estimates it, at the end of training; None where it does not.
    """

    number: int
    candidates: int
    kept: float | None
    desirable: float | None
    distinct: float | None
    rows: Mapping[str, int]
    kl: float | None

    @property
    def gap(self) -> float | None:
        """By how much the panel prefers the policy more than the first judge of the comparisons does."""
        if self.panel is None or self.panel.mean is None or self.score is None:
            return None
        return self.panel.mean - self.score


def round_stats(
    results: Mapping[str, StageResult], checker: str | None, *, draws: int = 2000, seed: int = 0
) -> list[RoundStats]:
    """Of every round with candidates, in order; empty for a run without rounds.

    Args:
        results: of all stages that are done.
    """
    shared = {name: result for name, result in results.items() if result.round == 0}
    numbers = sorted({result.round for result in of_role(results, "candidates")} - {0})
    options: Any = {"draws": draws, "seed": seed}
    return [
        _stats(shared | {name: one for name, one in results.items() if one.round == round}, round, checker, options)
        for round in numbers
    ]


def held_out(results: Mapping[str, StageResult], checker: str | None, **options: Any) -> HeldOut:
    """See `HeldOut`, as far as the results have it.

    Args:
        results: of one round.
        options: draws and seed of the intervals.
    """
    responses, comparisons = responses_of(results, checker), table_of(results, "comparisons")
    verdicts = table_of(results, "response verdicts")
    by_model: dict[str, list[ResponseStats]] = {"base": [], "policy": []}
    for stats in [] if responses is None else response_stats(responses, **options):
        by_model[stats.model].append(stats)
    panel = None
    if responses is not None and comparisons is not None and verdicts is not None:
        panel = _panel(responses, comparisons, verdicts, options)
    return HeldOut(
        policy=by_model["policy"],
        base=by_model["base"],
        scores={} if comparisons is None else {rate.judge: rate.score for rate in win_rates(comparisons, **options)},
        panel=panel,
    )


def responses_of(results: Mapping[str, StageResult], checker: str | None) -> pa.Table | None:
    """Responses of base and policy with their truth; in a run in rounds, the policy is named as in other runs.

    Args:
        results: of one round at most, see `of_final_round`.
    """
    responses, prompts = table_of(results, "responses"), table_of(results, "prompts")
    if responses is None:
        return None
    if any(result.round for result in of_role(results, "responses")):
        models = responses["model"]
        named = pc.if_else(pc.equal(models, "base"), models, "policy")
        responses = responses.set_column(responses.column_names.index("model"), "model", named)
    return responses if prompts is None else with_truth(responses, prompts, checker)


def _stats(results: Mapping[str, StageResult], round: int, checker: str | None, options: Any) -> RoundStats:
    candidates, decisions = table_of(results, "candidates"), table_of(results, "decisions")
    assert candidates is not None
    labels = {} if decisions is None else count_values(decisions["label"])
    desirable, undesirable = (labels.get(name, 0) for name in ("desirable", "undesirable"))
    decided = sum(labels.values())
    written = [result.facts.get("rows", {}) for result in of_role(results, "datasets")]
    return RoundStats(
        **vars(held_out(results, checker, **options)),
        number=round,
        candidates=candidates.num_rows,
        kept=(desirable + undesirable) / decided if decided else None,
        desirable=desirable / decided if decided else None,
        distinct=_distinct(candidates),
        rows={kind: sizes["train"] for rows in written for kind, sizes in rows.items()},
        kl=_kl(results),
    )


def _kl(results: Mapping[str, StageResult]) -> float | None:
    for trained in of_role(results, "policy"):
        metrics = Folder(trained.folder).read_table(METRICS, fingerprint=trained.fingerprint, schema=TRAIN_METRICS)
        if trend := summarise_training(metrics).trends.get("kl"):
            return trend.last
    return None


def _distinct(candidates: pa.Table) -> float | None:
    texts: dict[str, list[str]] = {}
    for row in candidates.select(["prompt_id", "response"]).to_pylist():
        if row["response"] is not None:
            texts.setdefault(row["prompt_id"], []).append(normalise_text(row["response"]))
    return float(np.mean([len(set(own)) / len(own) for own in texts.values()])) if texts else None


def _panel(responses: pa.Table, comparisons: pa.Table, verdicts: pa.Table, options: Any) -> Interval:
    """See `RoundStats.panel`; over the pairs of responses that were compared and whose scores were all read."""
    means, compared = response_means(verdicts), set(comparisons["pair_id"].to_pylist())
    ids: dict[tuple[str, str], dict[str, str]] = {}
    for row in responses.select(["prompt_id", "mode", "model", "response_id"]).to_pylist():
        ids.setdefault((row["prompt_id"], row["mode"]), {})[row["model"]] = row["response_id"]
    points, prompts = [], []
    for (prompt, _), pair in ids.items():
        policy, base = (pair.get(model, "") for model in ("policy", "base"))
        if pair_id(policy, base) in compared and policy in means and base in means:
            points.append(0.5 + 0.5 * float(np.sign(means[policy] - means[base])))
            prompts.append(prompt)
    return bootstrap_mean(points, prompts, **options, bounds=(0, 1))


# --- as a section -----------------------------------------------------------------------------------------------------


def rounds_section(rounds: Sequence[RoundStats], decided: Mapping[str, Any] | None) -> Section | None:
    """Curves over the rounds and their figures; None for a run without rounds.

    Args:
        decided: facts of the newest decision whether the run goes on; None where none is made.
    """
    if not rounds:
        return None
    judge = next((name for one in rounds for name in one.scores), "")
    columns = ["round", "candidates", "kept", "desirable", "distinct", "training rows", "KL to the reference"]
    data: Rows = [
        [
            str(one.number),
            number(one.candidates),
            percent(one.kept),
            percent(one.desirable),
            percent(one.distinct),
            ", ".join(f"{rows:,} {kind}" for kind, rows in one.rows.items()) or "–",
            number(one.kl, 3),
        ]
        for one in rounds
    ]
    modes: Rows = [
        [
            name,
            stats.mode,
            percent(stats.accuracy.mean) if stats.accuracy else "not known",
            percent_interval(stats.accuracy) if stats.accuracy else "–",
            number(stats.tokens.mean, 1),
            number(stats.truncated),
        ]
        for name, found in [("base", rounds[0].base), *((f"round {one.number}", one.policy) for one in rounds)]
        for stats in found
    ]
    preferred: Rows = [
        [
            f"round {one.number}",
            percent(score.mean),
            percent_interval(score),
            percent(one.panel.mean) if one.panel else "–",
            percent_interval(one.panel) if one.panel else "–",
            "–" if one.gap is None else f"{signed(100 * one.gap, 1)} points",
        ]
        for one in rounds
        for score in list(one.scores.values())[:1]
    ]
    blocks: list[Block] = [
        *([] if decided is None else [Text(decided["text"])]),
        Text(
            "The policy of a round is trained on answers of the policy before it. Sections below are about the "
            f"{'last' if decided is None else 'best'} round. Rising approval of the panel that made the data without "
            "that of the comparing judge or true accuracy, growing length and fewer distinct answers are signs of "
            "reward hacking."
        ),
        *panels(*_charts(rounds, judge)),
        Table(columns, data, title="Data by round"),
    ]
    if modes:
        head = ["policy of", "decoding", "true accuracy", "interval", "tokens", "cut at the limit"]
        blocks.append(Table(head, modes, text_columns=2, title="Answers to held-out prompts by round"))
    if preferred:
        head = ["policy of", f"score against base, judge {judge}", "95 %", "panel prefers it", "95 %", "panel − judge"]
        blocks.append(Table(head, preferred, title="Preferred to the base"))
    return Section("rounds", "Rounds", blocks)


def _charts(rounds: Sequence[RoundStats], judge: str) -> list[Chart | None]:
    def line(name: str, colour: str, values: Sequence[float | None]) -> Series:
        known = [(float(one.number), value) for one, value in zip(rounds, values, strict=True) if value is not None]
        return Series(name, colour, [x for x, _ in known], [y for _, y in known])

    scores = [one.score for one in rounds]
    panel = [None if one.panel is None else one.panel.mean for one in rounds]
    modes = list(dict.fromkeys(stats.mode for one in rounds for stats in one.policy))
    colours = dict(zip(modes, ("blue", "vermilion", "green"), strict=False))

    def by_mode(figure: Callable[[ResponseStats], float | None]) -> list[Series]:
        return [
            line(mode, colour, [next((figure(s) for s in one.policy if s.mode == mode), None) for one in rounds])
            for mode, colour in colours.items()
        ]

    return [
        lines("True accuracy", by_mode(lambda stats: None if stats.accuracy is None else stats.accuracy.mean), "round"),
        lines("Preferred to the base", [line(judge, "blue", scores), line("panel", "vermilion", panel)], "round"),
        lines("Tokens of an answer", by_mode(lambda stats: stats.tokens.mean), "round"),
        lines(
            "Candidates",
            [
                line("kept", "blue", [one.kept for one in rounds]),
                line("desirable", "green", [one.desirable for one in rounds]),
                line("distinct", "vermilion", [one.distinct for one in rounds]),
            ],
            "round",
        ),
    ]
