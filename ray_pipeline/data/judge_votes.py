"""What the judges of a run voted, and the truth where there is a checker, counted shard by shard for `judge_errors`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_pipeline.data.checkers import Check, checker_of
from ray_pipeline.data.judge_stats import scores_by_judge
from ray_pipeline.graph.results import of_role
from ray_pipeline.graph.stage import Stage, StageResult
from ray_pipeline.stats.bootstrap import Floats
from ray_pipeline.stats.columns import chunk
from ray_pipeline.stats.judge_errors import (
    GROUPS,
    PanelErrors,
    VoteCounts,
    count_votes,
    errors_against_truth,
    estimated_errors,
    total,
)
from ray_pipeline.stats.latent_class import MISSING, Votes
from ray_pipeline.store.keys import bucket_of, unit_hash

#: Classes of scores, and of the truth: a wrong response is to be undesirable, a right one desirable.
UNDESIRABLE, BETWEEN, DESIRABLE = 0, 1, 2
#: About how many candidates a checker decides at most, drawn by hash of their prompts: a checker may be slow.
MOST_CHECKED = 20_000


@dataclasses.dataclass(frozen=True)
class ErrorsOfJudges:
    """Errors against the truth, where a checker knows it, and by the estimate that does without.

    `checked` is the share of prompts whose candidates the checker decided.
    """

    truth: PanelErrors | None
    estimate: PanelErrors | None
    checked: float = 0.0

    @property
    def best(self) -> PanelErrors | None:
        """Against the truth if it is known."""
        return self.truth or self.estimate


def by_role(verdicts: Sequence[Stage]) -> dict[str, Stage]:
    """Stages of verdicts as inputs of another stage."""
    return {f"verdicts/{stage.name}": stage for stage in verdicts}


def judge_errors(
    results: Mapping[str, StageResult],
    checker: str | None = None,
    without: Collection[str] = (),
    *,
    desirable_from: float = 7.0,
    undesirable_to: float = 4.0,
    only: Callable[[str], bool] | None = None,
) -> ErrorsOfJudges | None:
    """Errors of all judges of the stages' verdicts; None without verdicts, or with a single judge and no checker.

    Args:
        results: stages that are done; read are tables of the roles prompts, candidates and verdicts.
        checker: reference to the checker; see `checker_of`.
        without: judges that are left out.
        only: of a candidate_id, whether it counts; default: all of them.

    Raises:
        ExtensionError: no such checker.
        ValueError: a judge's verdict occurs twice.
    """
    parts = {role: of_role(results, role) for role in ("prompts", "candidates", "verdicts")}
    if not all(parts.values()):
        return None
    judges = [judge for judge in _distinct(parts["verdicts"], "judge") if judge not in without]
    if not judges:
        return None
    decide = checker_of(checker, _distinct(parts["prompts"], "source"))
    candidates = sum(sum(result.rows.values()) for result in parts["candidates"])
    share = 0.0 if decide is None else min(1.0, MOST_CHECKED / max(1, candidates))
    bounds = (undesirable_to, desirable_from)
    counts = total(_shards(parts, judges, bounds, decide, share, only), len(judges))
    found = ErrorsOfJudges(errors_against_truth(judges, counts), estimated_errors(judges, counts), share)
    return None if found.best is None else found


def _shards(
    parts: Mapping[str, Sequence[StageResult]],
    judges: Sequence[str],
    bounds: tuple[float, float],
    decide: Check | None,
    share: float,
    only: Callable[[str], bool] | None,
) -> Iterator[VoteCounts]:
    for shard in range(parts["candidates"][0].num_shards):
        texts = [] if decide is None else ["response"]
        candidates = _read(parts["candidates"], shard, ["candidate_id", "prompt_id", *texts])
        if only is not None:
            mine = [only(name) for name in candidates["candidate_id"].to_pylist()]
            candidates = candidates.filter(pa.array(mine, pa.bool_()))
        verdicts = _read(parts["verdicts"], shard, ["candidate_id", "judge", "score"])
        votes = votes_of(chunk(candidates["candidate_id"]), verdicts, judges, bounds)
        prompts = candidates["prompt_id"].to_pylist()
        truth = np.full(len(prompts), MISSING, np.int8)
        if decide is not None:
            asked = _read(parts["prompts"], shard, ["prompt_id", "messages", "meta"])
            truth = _truth(candidates, asked, votes, decide, share)
        groups = np.array([bucket_of(prompt) % GROUPS for prompt in prompts], dtype=np.int64)
        yield count_votes(votes, truth, groups)


def votes_of(ids: pa.Array, verdicts: pa.Table, judges: Sequence[str], bounds: tuple[float, float]) -> NDArray[np.int8]:
    """Classes of the judges' scores, shape (ids, judges), MISSING where a score was not read.

    Args:
        bounds: a score up to the first is UNDESIRABLE, from the second DESIRABLE.
    """
    votes = np.full((len(ids), len(judges)), MISSING, np.int8)
    by_judge = scores_by_judge(verdicts, ids)
    for place, judge in enumerate(judges):
        if (scores := by_judge.get(judge)) is not None:
            votes[:, place] = vote_classes(scores, bounds)
    return votes


def vote_classes(scores: Floats, bounds: tuple[float, float]) -> Votes:
    """The class of each score, MISSING where it is NaN; bounds as of `votes_of`."""
    low, high = bounds
    classes = [scores <= low, scores >= high, ~np.isnan(scores)]
    return np.select(classes, [UNDESIRABLE, DESIRABLE, BETWEEN], MISSING).astype(np.int8)


def _truth(
    candidates: pa.Table, prompts: pa.Table, votes: NDArray[np.int8], decide: Check, share: float
) -> NDArray[np.int8]:
    """DESIRABLE where the checker calls a response right, UNDESIRABLE where wrong, MISSING where it does not decide."""
    asked = {row["prompt_id"]: row for row in prompts.to_pylist()}
    chosen = {prompt for prompt in asked if share >= 1 or unit_hash("checked", prompt) < share}
    truth = np.full(len(votes), MISSING, np.int8)
    voted = (votes != MISSING).any(axis=1)
    rows = zip(candidates["prompt_id"].to_pylist(), candidates["response"].to_pylist(), strict=True)
    for row, (prompt, response) in enumerate(rows):
        if voted[row] and prompt in chosen and response is not None:
            found = decide(asked[prompt]["messages"], response, asked[prompt]["meta"])
            truth[row] = MISSING if found is None else DESIRABLE if found.share == 1 else UNDESIRABLE
    return truth


def _read(stages: Sequence[StageResult], shard: int, columns: list[str]) -> pa.Table:
    return pa.concat_tables([stage.table().read(shard, columns) for stage in stages])


def _distinct(stages: Sequence[StageResult], column: str) -> list[str]:
    values = {v for stage in stages for part in stage.table().scan([column]) for v in part[column].unique().to_pylist()}
    return sorted(values)
