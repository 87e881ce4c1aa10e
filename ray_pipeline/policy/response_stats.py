"""Base against policy on held-out prompts: length, true accuracy where a checker applies, rubric scores."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.stats.bootstrap import Interval, bootstrap_gain, bootstrap_mean
from ray_pipeline.stats.columns import Spread, numbers, response_chars, spread
from ray_pipeline.store.schemas import cut_off

MODELS = ("base", "policy")


@dataclass(frozen=True)
class ResponseStats:
    """One model in one decoding mode. `truncated` counts those that were cut off; accuracy is None where the responses
    carry no truth, else over the rows whose truth is known. `followed` is the mean share of the requirements that are
    met, None where responses are only right or wrong.
    """

    model: str
    mode: str
    rows: int
    chars: Spread
    tokens: Spread
    truncated: int
    accuracy: Interval | None
    followed: Interval | None = None


@dataclass(frozen=True)
class RubricStats:
    """One judge's scores for base and policy (unit: points of its scale), and the gain over prompts read for both."""

    judge: str
    mode: str
    base: Interval
    policy: Interval
    base_unread: int
    policy_unread: int
    gain: Interval


def response_stats(
    responses: pa.Table, *, models: Sequence[str] = MODELS, draws: int = 2000, seed: int = 0
) -> list[ResponseStats]:
    """Length and accuracy per mode and model, in the order of `models`.

    Columns read: prompt_id, model, mode, response (or response_chars), completion_tokens, finish_reason;
    `correct` (bool, null where not known) and `followed` (share) where there is a checker.
    """
    found = []
    for mode in _modes(responses):
        for model in models:
            part = _part(responses, mode, model)
            if len(part):
                found.append(_one_model(part, model, mode, draws, seed))
    return found


def accuracy_gains(responses: pa.Table, *, draws: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """True accuracy of the policy minus that of the base per mode, paired by prompt; empty without a `correct` column.

    A mode that one of the two models lacks is left out.
    """
    gains: dict[str, Interval] = {}
    if "correct" not in responses.column_names:
        return gains
    for mode in _modes(responses):
        base, policy = (_known(_part(responses, mode, model), "correct") for model in MODELS)
        gain = bootstrap_gain(*base, *policy, draws=draws, seed=seed, bounds=(-1, 1))
        if gain.mean is not None:
            gains[mode] = gain
    return gains


def rubric_stats(response_verdicts: pa.Table, *, draws: int = 2000, seed: int = 0) -> list[RubricStats]:
    """Mean rubric score of base and policy per mode and judge.

    Columns read: prompt_id, model, judge, score (null when unread); `mode` where there is one.
    """
    found = []
    for mode in _modes(response_verdicts):
        for judge in sorted(response_verdicts.column("judge").unique().to_pylist()):
            own = response_verdicts.filter(pc.equal(response_verdicts.column("judge"), judge))
            parts = [_part(own, mode, model) for model in MODELS]
            if not any(len(part) for part in parts):
                continue
            base, policy = (_known(part, "score") for part in parts)
            found.append(
                RubricStats(
                    judge=judge,
                    mode=mode,
                    base=bootstrap_mean(*base, draws=draws, seed=seed),
                    policy=bootstrap_mean(*policy, draws=draws, seed=seed),
                    base_unread=parts[0].column("score").null_count,
                    policy_unread=parts[1].column("score").null_count,
                    gain=bootstrap_gain(*base, *policy, draws=draws, seed=seed),
                )
            )
    return found


def rubric_means(verdicts: pa.Table) -> tuple[dict[str, float | None], float | None]:
    """Each judge's mean over the scores that were read, and the mean over responses of the judges' mean.

    The second is over responses whose scores were all read: a mean over fewer judges is another scale.
    Columns read: candidate_id, judge, score (null when unread).
    """
    judges = sorted(verdicts.column("judge").unique().to_pylist())
    means = {judge: pc.mean(verdicts.filter(pc.field("judge") == judge).column("score")).as_py() for judge in judges}
    whole = list(response_means(verdicts).values())
    return means, float(np.mean(whole)) if whole else None


def response_means(verdicts: pa.Table) -> dict[str, float]:
    """Response → mean of its scores, for those whose scores were all read. Columns as in `rubric_means`."""
    judges = len(verdicts.column("judge").unique())
    of_response: dict[str, list[float]] = {}
    for name, score in zip(*(verdicts.column(c).to_pylist() for c in ("candidate_id", "score")), strict=True):
        of_response.setdefault(name, []).append(np.nan if score is None else score)
    return {
        name: float(np.mean(scores))
        for name, scores in of_response.items()
        if len(scores) == judges and not np.isnan(scores).any()
    }


def name_models(verdicts: pa.Table, responses: pa.Table) -> pa.Table:
    """Verdicts on responses (candidate_id holding a response_id) with the columns model and mode of those responses.

    Responses of models with equal weights have the same id, and a verdict each: in the order of both tables.

    Raises ValueError for a verdict on a missing response.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(responses.column("response_id").to_pylist()):
        places.setdefault(name, []).append(place)
    judged = list(zip(*(verdicts.column(name).to_pylist() for name in ("candidate_id", "judge")), strict=True))
    if missing := sum(name not in places for name, _ in judged):
        raise ValueError(f"{missing} verdicts judge a response that is not in responses")
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    own: list[int] = []
    for name, judge in judged:
        own.append(places[name][seen[name, judge] % len(places[name])])
        seen[name, judge] += 1
    for column in ("model", "mode"):
        verdicts = verdicts.append_column(column, responses.column(column).take(pa.array(own, pa.int64())))
    return verdicts


def _one_model(part: pa.Table, model: str, mode: str, draws: int, seed: int) -> ResponseStats:
    accuracy: Interval | None = None
    followed: Interval | None = None
    if "correct" in part.column_names:
        values, prompts = _known(part, "correct")
        accuracy = bootstrap_mean(values, prompts, draws, seed, bounds=(0, 1)) if len(values) else None
        shares, prompts = _known(part, "followed") if "followed" in part.column_names else (values, prompts)
        if ((shares > 0) & (shares < 1)).any():
            followed = bootstrap_mean(shares, prompts, draws, seed, bounds=(0, 1))
    return ResponseStats(
        model=model,
        mode=mode,
        rows=len(part),
        chars=spread(response_chars(part)),
        tokens=spread(numbers(part.column("completion_tokens"))),
        truncated=pc.sum(cut_off(part.column("finish_reason"))).as_py() or 0,
        accuracy=accuracy,
        followed=followed,
    )


def _modes(table: pa.Table) -> list[str]:
    return sorted(table.column("mode").unique().to_pylist()) if "mode" in table.column_names else [""]


def _part(table: pa.Table, mode: str, model: str) -> pa.Table:
    mask = pc.equal(table.column("model"), model)
    if "mode" in table.column_names:
        mask = pc.and_(mask, pc.equal(table.column("mode"), mode))
    return table.filter(mask)


def _known(part: pa.Table, column: str) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Values of `column` that are not null, with their prompts."""
    rows = part.filter(pc.is_valid(part.column(column)))
    return numbers(rows.column(column)), np.asarray(rows.column("prompt_id").to_pylist(), dtype=np.str_)
