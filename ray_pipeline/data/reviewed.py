"""Labels by people, as the page of `quorum review` saves them: read back, and put into decisions."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator, Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.rows import one_array
from ray_pipeline.data.sources.files import find_files, jsonl_records, sha256
from ray_pipeline.data.sources.source import InputError

HumanLabel = Literal["desirable", "undesirable"]

#: What a person may say of a candidate; `unsure` counts as no label.
ANSWERS = ("desirable", "undesirable", "unsure")

#: `why` of a decision with a person's label: who gave it, and the gate's own `why`.
_PERSON, _GATE = "a person: ", "; the gate: "


class HumanLabels(Settings):
    """Labels by people, in a file that the page of `quorum review` saved.

    The file is read once, when the stages are wired: its labels go to the workers with these settings, so that all of
    them use the labels of one digest, whatever becomes of the file.
    """

    path: str = Field(
        description="JSONL, one object a line with `candidate_id` and `label` (desirable, undesirable or unsure); "
        "several files by a pattern"
    )
    use: Literal["report", "gate"] = Field(
        "report",
        description="report: the page shows how far the gate agrees with them; gate: they also replace its labels",
    )

    def read(self) -> Reviewed:
        """Raises InputError, naming file and line, where the file cannot be read or a row is none."""
        return self._content[0]

    def digest(self) -> dict[str, str]:
        """SHA-256 of each file, for fingerprints, whatever their names. Raises InputError, as `read`."""
        return self._content[1]

    @functools.cached_property
    def _content(self) -> tuple[Reviewed, dict[str, str]]:
        digests = sorted(sha256(file) for file in find_files(self.path))
        return read_labels(self.path), {f"human labels {n}": digest for n, digest in enumerate(digests)}


#: The key `human_labels`: a file alone is read for the report.
HumanLabelsKey = Annotated[
    HumanLabels | None, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)
]


@dataclasses.dataclass(frozen=True)
class Reviewed:
    """Labels by people.

    Attributes:
        labels: candidate_id → label, where all who labelled it agree.
        drawn: the candidates among them that were drawn evenly, so that shares over them hold for the run.
        probabilities: candidate_id → probability with which the review drew it, where it is known. A larger review of a
            run contains every smaller one, so that of several probabilities the largest is that of the largest.
        unsure: candidates that everybody left open.
        contested: candidates that people labelled differently. They count as not labelled.
    """

    labels: Mapping[str, HumanLabel]
    drawn: frozenset[str] = frozenset()
    probabilities: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unsure: int = 0
    contested: int = 0


def read_labels(path: str) -> Reviewed:
    """The labels of one or several files. Raises InputError, naming file and line."""
    said: dict[str, set[str]] = collections.defaultdict(set)
    drawn = set()
    probabilities: dict[str, float] = {}
    for file in find_files(path):
        for number, row in jsonl_records(file):
            where = f"{file.uri}: line {number}"
            name, label = row.get("candidate_id"), row.get("label")
            if not isinstance(name, str):
                raise InputError(f"{where} has no candidate_id; every row needs the one that `quorum review` wrote")
            if label not in ANSWERS:
                raise InputError(f"{where} has label {label!r}; use {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}")
            said[name].add(label)
            if row.get("chosen_as") == "chance":
                drawn.add(name)
            if (p := row.get("probability")) is not None:
                if isinstance(p, bool) or not isinstance(p, int | float) or not 0 < p <= 1:
                    raise InputError(
                        f"{where} has probability {p!r}; keep the number above 0 and up to 1 that `quorum review` wrote"
                    )
                probabilities[name] = max(float(p), probabilities.get(name, 0.0))
    if not said:
        raise InputError(f"{path} has no labels; label rows on the page of `quorum review`, and save them")
    sure = {name: labels - {"unsure"} for name, labels in said.items()}
    labels: dict[str, Any] = {name: next(iter(found)) for name, found in sure.items() if len(found) == 1}
    return Reviewed(
        labels,
        frozenset(drawn & labels.keys()),
        {name: probability for name, probability in probabilities.items() if name in labels},
        unsure=sum(not found for found in sure.values()),
        contested=sum(len(found) > 1 for found in sure.values()),
    )


def overrule(decisions: pa.Table, labels: Mapping[str, HumanLabel]) -> tuple[pa.Table, int]:
    """Decisions in which people's labels replace the gate's, and how many differ.

    Scores stay as they are, and a candidate without a final score keeps the gate's: its training row would lack scores.
    """
    ids, old, why = (one_array(decisions[name]) for name in ("candidate_id", "label", "why"))
    given = pa.array([labels.get(name) for name in ids.to_pylist()], pa.string())
    given = pc.if_else(one_array(decisions["final_score"]).is_valid(), given, pa.scalar(None, pa.string()))
    new = pc.coalesce(given, old)
    said = pc.binary_join_element_wise(_PERSON, new, _GATE, why, "")
    columns = {"label": new, "why": pc.if_else(given.is_valid(), said, why)}
    for name, column in columns.items():
        place = decisions.column_names.index(name)
        decisions = decisions.set_column(place, decisions.schema.field(place), column)
    return decisions, pc.sum(pc.not_equal(new, old)).as_py() or 0


def replaced_reason(why: str) -> str | None:
    """The gate's `why` behind that of a decision with a person's label; None where the label is the gate's."""
    return why.partition(_GATE)[2] if why.startswith(_PERSON) else None
