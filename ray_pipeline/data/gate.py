"""The gate: scores of the judges and the critic's verdict become one label for each candidate.

With n judges, scores s_1 … s_n and the critic's p (1 = flawed, 0 = sound), for each candidate:

    m = (s_1 + … + s_n) / n                      mean_score
    v = sum (s_i - m)^2 / (n - 1)                score_variance; 0 for a single judge
    f = m · (1 - α·p)                            final_score; penalty = α·p

and the first line that fits decides:

    the text was cut off            incomplete    (see `cut` for other rules)
    a score was not read            incomplete
    v > τ                           abstain       (the judges disagree)
    the critique was not read       incomplete
    f ≥ desirable_at                desirable
    f ≤ undesirable_at              undesirable
    otherwise                       discard

What was not read stays unread: it is never replaced by a number (docs/architecture.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.rows import KeyMismatch, one_array, refuse_repeats, rows_of
from ray_pipeline.stats.latent_class import FEWEST
from ray_pipeline.store.schemas import DECISIONS, LABELS, READ_STATUSES, cut_off

Floats = NDArray[np.float64]
Mask = NDArray[Any]  # of bool

Cut = Literal["exclude", "undesirable", "keep"]
"""What becomes of a candidate whose text is not whole (finish reason `length`, `content_filter`, …)."""

#: Latent class models of the judges' votes, by the names that `measure.juries.pool` has for them.
PosteriorPool = Literal["one_coin", "dawid_skene"]

CUT_RULES = (
    "rule for a response that ended before its text was whole (limit of tokens, content filter): exclude it, let it be "
    "no more than undesirable, or keep it like any other"
)


#: Case of a decision → its label; the other cases have the name of their label.
_LABEL_OF = {"cut": "incomplete", "unread": "incomplete", "disagree": "abstain", "uncriticised": "incomplete"}


class Cases(NamedTuple):
    """What the formulas give for each row (NaN where they cannot be computed), and the one case that it is."""

    mean: Floats
    variance: Floats
    penalty: Floats
    final: Floats
    cases: dict[str, Mask]

    @property
    def labels(self) -> pa.StringArray:
        """The label of each row."""
        return labels_of(self.cases)


#: Keys of the gate that only one kind reads.
_KEYS_OF = {"certified": ("agree_with_humans", "confidence", "labels"), "posterior": ("posterior_at",)}


class GateConfig(Settings):
    """Thresholds of the gate; the defaults are the published ones."""

    alpha: float = Field(0.15, ge=0, le=1, description="α, the share of the mean that a flaw costs")
    tau: float = Field(
        2.5, ge=0, description="τ, the largest sample variance at which the judges still count as agreeing"
    )
    desirable_at: float = Field(7.0, description="f from which a candidate is desirable")
    undesirable_at: float = Field(4.0, description="f up to which it is undesirable")
    use_variance: bool = Field(
        True, description="False: nothing abstains (ablation). The variance is still computed and written"
    )
    use_critic: bool = Field(True, description="False: f = m, and critiques are not read (ablation)")
    cut: Cut = Field("exclude", description=CUT_RULES)
    kind: Literal["published", "certified", "posterior"] = Field(
        "published",
        description="published: the thresholds above; certified: only labels that people agree with often enough, by a "
        "test on labels of people; posterior: labels that are probable enough given the votes of all judges "
        "(docs/operating.md)",
    )
    pool: PosteriorPool | None = Field(
        None,
        description="latent class model of the judges' votes (one_coin: one accuracy for each judge; dawid_skene: a "
        "table of errors for each), fitted without labels; its posterior of each candidate is in columns of the "
        "decisions, and kind: posterior decides by it; default: none",
    )
    posterior_at: float = Field(
        0.9, gt=0.5, le=1, description="posterior: probability from which a candidate has a label; below it abstains"
    )
    agree_with_humans: float = Field(
        0.9, gt=0, lt=1, description="certified: share of the labels that people must agree with"
    )
    confidence: float = Field(
        0.9, gt=0, lt=1, description="certified: probability with which that holds, over the draw of the labels"
    )
    labels: str | None = Field(
        None, description="certified: labels by people for candidates drawn by chance (`quorum review RUN --chance`)"
    )

    @model_validator(mode="after")
    def _certified(self) -> GateConfig:
        if self.kind == "certified":
            if self.labels is None:
                raise ValueError(
                    "kind certified needs labels, a file that the page of `quorum review RUN --chance` saved"
                )
            if self.pool is not None:
                raise ValueError("pool has no effect on kind certified; remove it, or set kind to posterior")
        for kind, keys in _KEYS_OF.items():
            if kind != self.kind and (more := [key for key in keys if getattr(self, key) != self._default(key)]):
                raise ValueError(f"{more[0]} is read by kind: {kind} alone; set kind, or remove it")
        if self.kind != "published" and self.cut == "undesirable":
            raise ValueError(f"cut: undesirable has no meaning for kind {self.kind}; use exclude or keep")
        if self.kind == "posterior" and self.pool is None:
            raise ValueError("kind posterior needs pool: one_coin or dawid_skene")
        return self

    def decisive(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Without the place of the labels: their digest is in the fingerprint of the gate, which reads them."""
        return super().decisive({*exclude, "labels"})

    @classmethod
    def _default(cls, key: str) -> Any:
        return cls.model_fields[key].default

    def decides_by(self) -> dict[str, Any]:
        """Its settings as plain data, without those that its kind does not read and without the place of a file."""
        unread = {"labels", *(key for kind, keys in _KEYS_OF.items() if kind != self.kind for key in keys)}
        if self.kind == "posterior":
            unread |= {"tau", "use_variance"}
        else:
            unread |= {"pool"} if self.kind == "certified" else {"pool", "kind"}
        return self.model_dump(mode="json", exclude=unread)

    @property
    def over_all(self) -> bool:
        """Whether it needs all candidates of a run at once."""
        return self.kind != "published" or self.pool is not None

    @property
    def numbers(self) -> GateConfig:
        """The published gate with the same thresholds, which computes the numbers that other kinds decide by."""
        own = {key: self._default(key) for key in ("kind", "pool", *itertools.chain(*_KEYS_OF.values()))}
        return self.model_copy(update=own | ({"use_variance": False} if self.kind == "posterior" else {}))

    @model_validator(mode="after")
    def _in_order(self) -> GateConfig:
        if self.undesirable_at >= self.desirable_at:
            raise ValueError(
                f"undesirable_at ({self.undesirable_at:g}) must be below desirable_at ({self.desirable_at:g})"
            )
        return self


def check_pool(gate: GateConfig | None, judges: Sequence[str]) -> None:
    """Raises ValueError if the gate has a pool and fewer judges than show who of them is right."""
    if gate is not None and gate.pool is not None and len(judges) < FEWEST:
        raise ValueError(
            f"gate.pool needs {FEWEST} judges or more, because fewer cannot show who of them is right; there "
            f"{'is' if len(judges) == 1 else 'are'} {len(judges)}"
        )


def decide(
    candidates: pa.Table,
    verdicts: pa.Table,
    critiques: pa.Table | None,
    judges: Sequence[str],
    config: GateConfig,
) -> pa.Table:
    """One decision for each candidate, in the order of `candidates`. Joins are by id and judge, never by position.

    Args:
        candidates: columns candidate_id, prompt_id and, if it is there, finish_reason are read.
        verdicts: columns candidate_id, judge, score, parse_status. A judge's missing row is an unread score;
            rows of judges that are not in `judges` are left out.
        critiques: columns candidate_id, flawed, parse_status; None only when `config.use_critic` is False.
        judges: whose scores count; their order is the order of summation.

    Returns:
        A table of schema DECISIONS. What could not be computed is null.

    Raises:
        KeyMismatch: a candidate, verdict or critique occurs twice, or a verdict or critique belongs to no candidate.
        ValueError: there are no judges, one occurs twice, critiques are needed and missing, or the gate needs all
            candidates of a run at once.
    """
    judges = list(judges)
    if not judges or len(set(judges)) < len(judges):
        raise ValueError(f"the gate needs one or more distinct judges, not {judges}")
    if config.over_all:
        named = "gate.pool" if config.kind == "published" else f"gate.kind {config.kind}"
        raise ValueError(f"{named} needs all candidates of a run; use `quorum run dmapo`")
    ids = one_array(candidates["candidate_id"])
    refuse_repeats(ids, "candidates: candidate_id")

    scores, read = read_scores(verdicts, ids, judges)
    flawed = np.zeros(len(ids))
    if config.use_critic:
        if critiques is None:
            raise ValueError("the gate has no critiques; run the critic stage, or set gate.use_critic to false")
        flawed = _flaws(critiques, ids)
    reasons = cut_reasons(candidates)
    found = label_cases(scores, flawed, reasons != "", config)
    columns = {
        "candidate_id": ids,
        "prompt_id": one_array(candidates["prompt_id"]),
        "mean_score": with_nulls(found.mean),
        "score_variance": with_nulls(found.variance),
        "penalty": with_nulls(found.penalty),
        "final_score": with_nulls(found.final),
        "label": found.labels,
        "why": _reasons(found, reasons, read, judges, config),
    }
    return pa.table([columns[name] for name in DECISIONS.names], schema=DECISIONS)


def label_cases(scores: Floats, flawed: Floats, cut: Mask, config: GateConfig) -> Cases:
    """The formulas of the gate, for each row.

    Args:
        scores: shape [rows, judges], NaN where unread.
        flawed: p of each row, NaN where the critique was not read.
        cut: whether the text of the candidate is not whole.
    """
    mean, variance = mean_and_variance(scores)
    penalty = config.alpha * flawed
    final = mean * (1.0 - penalty)
    return Cases(mean, variance, penalty, final, cases_of(variance, final, cut, config))


def cases_of(variance: Floats, final: Floats, cut: Mask, config: GateConfig) -> dict[str, Mask]:
    """The rule that makes one case of the numbers of each row.

    Args:
        variance: NaN where a score was not read, shape [rows].
        final: NaN where a score or the critique was not read.
        cut: whether the text of the candidate is not whole.
    """
    cut = cut & (config.cut != "keep")
    barred = cut & (config.cut == "exclude")
    complete: Mask = ~np.isnan(variance)
    disagree = complete & (variance > config.tau) & config.use_variance
    scored = complete & ~disagree & ~np.isnan(final)
    cases: dict[str, Mask] = {
        "cut": barred | (cut & scored & (final >= config.desirable_at)),
        "unread": ~complete,
        "disagree": disagree,
        "uncriticised": complete & ~disagree & np.isnan(final),
        "desirable": scored & (final >= config.desirable_at),
        "undesirable": scored & (final <= config.undesirable_at),
        "discard": scored & (final < config.desirable_at) & (final > config.undesirable_at),
    }
    for name in list(cases)[1:]:
        cases[name] = cases[name] & ~cases["cut"]
    return cases


def labels_of(cases: Mapping[str, Mask]) -> pa.StringArray:
    """The label of each row."""
    case = np.select(list(cases.values()), range(len(cases)))
    return pa.array([_LABEL_OF.get(name, name) for name in cases]).take(pa.array(case))


def cut_reasons(candidates: pa.Table) -> NDArray[Any]:
    """The finish reason of each candidate whose text is not whole, and "" for the others."""
    if "finish_reason" not in candidates.column_names:
        return np.full(candidates.num_rows, "", dtype=object)
    reason = one_array(candidates["finish_reason"])
    reasons: NDArray[Any] = np.asarray(pc.if_else(cut_off(reason), reason, "").to_pylist(), dtype=object)
    return reasons


def label_counts(decisions: pa.Table) -> dict[str, int]:
    """Rows of each label, in the order of `schemas.LABELS`; labels without rows are 0."""
    counts = pc.value_counts(one_array(decisions["label"]))
    found = dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))
    return {label: found.get(label, 0) for label in LABELS}


def mean_and_variance(scores: Floats) -> tuple[Floats, Floats]:
    """Mean and sample variance (n - 1) of each row of scores [rows, judges]; NaN where a score is NaN.

    Sums run judge by judge, so that the result does not depend on how numpy splits a sum. The variance is taken of
    d_i = s_i - s_1 as (n·Σd² - (Σd)²) / (n·(n-1)): for integer scores its numerator is exact, so that a variance of
    exactly τ is never mistaken for more, and equal scores of any kind give exactly 0.
    """
    rows, n = scores.shape
    total, linear, square = np.zeros(rows), np.zeros(rows), np.zeros(rows)
    for j in range(n):
        away = scores[:, j] - scores[:, 0]
        total += scores[:, j]
        linear += away
        square += away * away
    if n == 1:
        return total, 0.0 * total  # keeps NaN
    return total / n, np.maximum(n * square - linear * linear, 0.0) / (n * (n - 1))


def read_scores(verdicts: pa.Table, ids: pa.Array, judges: list[str]) -> tuple[Floats, Mask]:
    """Scores [candidates, judges], NaN where unread, and where they were read."""
    row = rows_of(verdicts["candidate_id"], ids, "verdicts: candidate", "candidates")
    judge = np.asarray(
        pc.fill_null(pc.index_in(one_array(verdicts["judge"]), value_set=pa.array(judges, pa.string())), -1)
    )
    counted = judge >= 0
    cell = row[counted] * len(judges) + judge[counted]
    places, times = np.unique(cell, return_counts=True)
    if (times > 1).any():
        twice = int(places[times > 1][0])
        raise KeyMismatch(
            f"verdicts: candidate {ids[twice // len(judges)].as_py()!r} has more than one verdict of judge "
            f"{judges[twice % len(judges)]!r}"
        )
    flat = np.full(len(ids) * len(judges), np.nan)
    flat[cell] = _read_values(verdicts, "score")[counted]
    scores = flat.reshape(len(ids), len(judges))
    return scores, ~np.isnan(scores)


def _flaws(critiques: pa.Table, ids: pa.Array) -> Floats:
    """p (0.0 or 1.0, NaN where unread) of each candidate."""
    row = rows_of(critiques["candidate_id"], ids, "critiques: candidate", "candidates")
    refuse_repeats(one_array(critiques["candidate_id"]), "critiques: candidate")
    flawed = np.full(len(ids), np.nan)
    flawed[row] = _read_values(critiques, "flawed")
    return flawed


def _read_values(table: pa.Table, column: str) -> Floats:
    """A column as float64; NaN where it is null or its parse status is not a read one."""
    values = one_array(table[column])
    if pa.types.is_boolean(values.type):  # Arrow has no cast from bool to double
        values = values.cast(pa.int8())
    read = pc.is_in(one_array(table["parse_status"]), value_set=pa.array(READ_STATUSES, pa.string()))
    numbers = np.array(values.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
    numbers[~np.asarray(read) | ~np.isfinite(numbers)] = np.nan
    return numbers


def with_nulls(values: Floats) -> pa.Array:
    """A column of numbers; NaN is null."""
    return pa.array(values, mask=np.isnan(values))


def _reasons(found: Cases, reasons: NDArray[Any], read: Mask, judges: list[str], config: GateConfig) -> pa.Array:
    """`why` of each row. Text is made once for each distinct value, not for each row."""
    low, high, final = config.undesirable_at, config.desirable_at, found.final
    missing = (~read) @ (1 << np.arange(len(judges), dtype=np.int64))  # one bit for each unread judge
    words: dict[str, tuple[NDArray[Any], Callable[..., Any]]] = {
        "cut": (reasons, cut_text),
        "unread": (missing, lambda bits: "unread: " + ", ".join(j for i, j in enumerate(judges) if int(bits) >> i & 1)),
        "disagree": (found.variance, lambda v: f"variance {_shown(v, config.tau)} > {config.tau:g}"),
        "uncriticised": (missing, lambda _: "critique unread"),
        "desirable": (final, lambda f: f"final {_shown(f, high)} ≥ {high:g}"),
        "undesirable": (final, lambda f: f"final {_shown(f, low)} ≤ {low:g}"),
        "discard": (final, lambda f: f"final {_shown(f, low, high)} between {low:g} and {high:g}"),
    }
    texts: list[str] = []
    place = np.zeros(len(read), dtype=np.int64)
    for name, mask in found.cases.items():
        values, text = words[name]
        distinct, which = np.unique(values[mask], return_inverse=True)
        place[mask] = which + len(texts)
        texts += [text(value) for value in distinct]
    return pa.array(texts, pa.string()).take(pa.array(place))


def cut_text(reason: str) -> str:
    """`why` of a candidate that is left out for its finish reason."""
    return f"cut off: {reason}"


def _shown(value: float, *thresholds: float) -> str:
    """Two digits, or as many as needed to stay on the right side of the thresholds (6.998 is not shown as 7.00)."""
    for digits in range(2, 15):
        text = f"{value:.{digits}f}"
        if all((float(text) > t) == (value > t) and (float(text) < t) == (value < t) for t in thresholds):
            return text
    return repr(float(value))
