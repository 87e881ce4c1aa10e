"""Datasets of a comparison: the rules by which each is made, and faults planted on purpose.

A planted fault makes the decisions of a broken pipeline from stored verdicts and critiques. If a policy learns as well
from such data as from the method's own, the comparison cannot show what the broken part is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.dataset_files import Keep
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.data.preference_sources import PreferenceSource
from ray_pipeline.data.rows import one_array
from ray_pipeline.data.ungated import Rejected
from ray_pipeline.store.keys import unit_hash

Fault = Literal["critic_inverted", "critic_sign", "labels_flipped"]
"""What is broken: critiques say the opposite; a flaw raises the score; desirable and undesirable are exchanged."""

#: Those that a gate without a critic cannot have.
_OF_CRITIC: tuple[Fault, ...] = ("critic_inverted", "critic_sign")


class DataVariant(Settings):
    """How a dataset is made: from the run's candidates and scores, or from imported rows."""

    gated: bool = Field(
        True,
        description="let the confidence gate decide; if false, take the best and worst of k by mean score, "
        "whatever the score",
    )
    gate: dict[str, Any] = Field(
        default_factory=dict,
        description="overrides of the `gate` block ({use_variance: false}, {use_critic: false}, {tau: 1})",
    )
    judges: tuple[str, ...] | None = Field(None, min_length=1, description="whose scores count; default: all")
    rejected: Rejected = Field(
        "worst",
        description="the rejected response of a prompt without a gate: the worst, or one of those below the best, at "
        "random by its hash",
    )
    k: int | None = Field(None, ge=2, description="number of candidates used of each prompt; default: all")
    min_gap: float | None = Field(
        None,
        ge=0,
        description="minimum gap of a pair's scores; default: datasets.min_gap with the gate, any gap above 0 without",
    )
    fault: Fault | None = Field(
        None,
        description="break the gate on purpose, to see what a part of it is worth: invert every critique, flip the "
        "sign of the critic's penalty, or exchange desirable and undesirable (also without a gate)",
    )
    fault_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="labels_flipped: share of the prompts whose labels are exchanged, by their hash; a larger share "
        "contains the prompts of a smaller one. Judges' scores, and weights of rows, stay as they are",
    )
    source: PreferenceSource | None = Field(
        None, description="import training rows from a Hub dataset or from files; excludes the keys above"
    )
    max_prompts: int | None = Field(
        None,
        ge=1,
        description="largest number of prompts to train on (smallest hashes kept): without a gate as many pairs, and "
        "twice as many KTO rows; default: all",
    )
    keep: Keep = Field(
        "random",
        description="which prompts max_prompts keeps: random (by hash), margin (largest gap of final scores, for KTO "
        "their range), or confidence (largest probability that the labels are right by all judges, as in BeeS: "
        "arXiv:2502.14560; needs datasets.weights)",
    )
    size_of: str | None = Field(
        None,
        description="another dataset: this one is cut at random to its number of training rows (for KTO, of each "
        "class), with other rows for each seed, so that the two do not differ in size",
    )

    @model_validator(mode="after")
    def _one_way(self) -> DataVariant:
        set_here = sorted(self.model_fields_set - {"source", "max_prompts", "keep", "size_of"})
        if self.source is not None and set_here:
            raise ValueError(f"{set_here[0]} has no effect on rows of a source, which are judged already; remove it")
        if not self.gated and self.gate:
            raise ValueError("gate has no effect when gated is false")
        if not self.gated and self.fault in _OF_CRITIC:
            raise ValueError(f"fault {self.fault} breaks the gate, so it has no effect when gated is false; remove it")
        if self.fault_share < 1 and self.fault != "labels_flipped":
            raise ValueError("fault_share is read by fault labels_flipped alone; remove it")
        if self.gated and self.rejected != "worst":
            raise ValueError(f"rejected: {self.rejected} has no effect with a gate; set gated to false, or remove it")
        if self.max_prompts is None and self.keep != "random":
            raise ValueError(f"keep: {self.keep} has no effect without max_prompts; set max_prompts, or remove it")
        return self

    @property
    def departs(self) -> bool:
        """Whether its rows are others than those that a gate of the method keeps."""
        return not self.gated or self.fault is not None or self.size_of is not None or self.keep != "random"

    def how(self, judges: Sequence[str], drawn: int, gate: GateConfig | None) -> str:
        """How the dataset is made, as its page and its card describe it.

        Args:
            judges: of the run.
            drawn: number of candidates that the run draws for each prompt; 0: they are the user's.
            gate: of this dataset; None without one.
        """
        cut = "" if self.keep == "random" else f"; the {self.max_prompts} prompts of the largest {self.keep}"
        cut += "" if self.size_of is None else f"; cut at random to the size of {self.size_of}"
        share = "" if self.fault_share == 1 else f" in {100 * self.fault_share:g} % of the prompts"
        fault = "" if self.fault is None else f"planted fault: {self.fault.replace('_', ' ')}{share}"
        if self.source is not None:
            place = self.source.name if self.source.type == "huggingface" else self.source.place
            return f"{self.source.format} rows of {place}{cut}"
        counted, k = ", ".join(self.judges or judges), self.k or drawn or "all"
        if gate is None:
            worst = "worst" if self.rejected == "worst" else "a random other"
            return f"best and {worst} of {k} by {counted}; no gate{fault and ', '}{fault}{cut}"
        rules = [] if gate.kind == "posterior" else [f"tau {gate.tau:g}" if gate.use_variance else "no variance rule"]
        rules.append(f"alpha {gate.alpha:g}" if gate.use_critic else "no critic")
        rules += [f"certified at {gate.agree_with_humans:g}"] if gate.kind == "certified" else []
        rules += [f"posterior ({gate.pool}) from {gate.posterior_at:g}"] if gate.kind == "posterior" else []
        rules += [fault] if fault else []
        return f"gate on {k} candidates by {counted}; {', '.join(rules)}{cut}"

    def check_fault(self, gate: GateConfig | None) -> None:
        """Raises ValueError if the dataset's gate cannot have the fault."""
        if self.fault in _OF_CRITIC and not (gate is not None and gate.use_critic and gate.alpha):
            raise ValueError(f"fault {self.fault} has no effect where the gate uses no critic; remove it")
        if self.fault is not None and gate is not None and gate.kind != "published":
            raise ValueError("fault breaks the published gate; remove it, or set gate.kind to published")


def decide_with_fault(
    fault: Fault | None,
    candidates: pa.Table,
    verdicts: pa.Table,
    critiques: pa.Table | None,
    judges: Sequence[str],
    gate: GateConfig,
    share: float = 1.0,
) -> pa.Table:
    """The decisions of `gate.decide`, as a pipeline with this fault would make them; without one, its own.

    Arguments, table and errors are those of `gate.decide`; `share` is that of `labels_flipped`. What was not read stays
    unread under every fault.
    """
    if fault == "critic_inverted" and critiques is not None:
        opposite = pc.invert(one_array(critiques["flawed"]))
        critiques = critiques.set_column(critiques.schema.get_field_index("flawed"), "flawed", opposite)
    if fault == "critic_sign":
        gate = gate.model_copy(update={"alpha": -gate.alpha})  # copied without validation, which refuses it
    decisions = decide(candidates, verdicts, critiques, judges, gate)
    return labels_flipped(decisions, share) if fault == "labels_flipped" else decisions


def labels_flipped(decisions: pa.Table, share: float = 1.0) -> pa.Table:
    """Decisions with desirable and undesirable exchanged, for a share of the prompts that follows from their hashes.

    Their final scores change sign, so that a pair's chosen and rejected response are exchanged and its gap stays.
    """
    label, why = one_array(decisions["label"]), one_array(decisions["why"])
    flipped = pa.array([unit_hash("flipped", p) < share for p in decisions["prompt_id"].to_pylist()], pa.bool_())
    good, bad = (pc.and_(flipped, pc.equal(label, side)) for side in ("desirable", "undesirable"))
    columns = {
        "label": pc.if_else(good, "undesirable", pc.if_else(bad, "desirable", label)),
        "why": pc.if_else(pc.or_(good, bad), pc.binary_join_element_wise("flipped", why, ": "), why),
        "final_score": pc.if_else(flipped, pc.negate(one_array(decisions["final_score"])), decisions["final_score"]),
    }
    for name, column in columns.items():
        place = decisions.schema.get_field_index(name)
        decisions = decisions.set_column(place, decisions.schema.field(place), column)
    return decisions
