"""A dataset made from the scores of candidates: its rules as a value, and the stages that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ray_pipeline.data.card import Provenance
from ray_pipeline.data.certified_gate import certified_stage
from ray_pipeline.data.dataset_files import Keep
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.datasets import Judged, dataset_files, dataset_rows
from ray_pipeline.data.decisions import gate as gate_stage
from ray_pipeline.data.early_exit import ExitRule, Scale
from ray_pipeline.data.escalation import CallRule, Escalation
from ray_pipeline.data.gate import Cut, GateConfig
from ray_pipeline.data.posterior_gate import posterior_stage
from ray_pipeline.data.reviewed import HumanLabels
from ray_pipeline.data.ungated import Rejected
from ray_pipeline.data.variants import Fault
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.stage import Stage


@dataclasses.dataclass(frozen=True)
class ScoredDataset:
    """The rules of a dataset. A run is wired from them, an audit checks against them, `quorum regate` changes them.

    Attributes:
        judges: whose scores count.
        gate: None for best and worst of k.
        policy: whose tokenizer counts the rows' tokens; None: they are estimated.
        files: name of a stage that writes training files → its settings; they differ in the seed alone.
        decisions, rows: names of the stages before the files.
        first: use only this number of candidates per prompt; default: all.
        cut: rule for candidates whose text is not whole, where there is no gate.
        rejected: which candidate is undesirable, where there is no gate.
        max_prompts: largest number of prompts in each training split; default: all.
        keep: which prompts these are.
        view: link to the files in the run folder.
        origin, trained_on: see `dataset_files`.
        humans: labels by people that replace the gate's.
        fault: what is broken in the gate on purpose, in the share `fault_share` of the prompts.
        exit_rule: by which calls to judges and the critic were skipped; None: none were.
        scale: of the judges' scores, for weights of rows.
    """

    judges: Sequence[str]
    gate: GateConfig | None
    policy: ModelSettings | None
    files: Mapping[str, DatasetsConfig]
    decisions: str = "gate"
    rows: str = "dataset-rows"
    first: int | None = None
    cut: Cut = "exclude"
    rejected: Rejected = "worst"
    max_prompts: int | None = None
    keep: Keep = "random"
    view: str = ""
    origin: Provenance = dataclasses.field(default_factory=Provenance)
    humans: HumanLabels | None = None
    fault: Fault | None = None
    fault_share: float = 1.0
    trained_on: bool = True
    exit_rule: CallRule | None = None
    scale: Scale | None = None

    @property
    def config(self) -> DatasetsConfig:
        """Settings of its rows."""
        return next(iter(self.files.values()))

    def decide(self, candidates: Stage, verdicts: Sequence[Stage], critiques: Stage | None) -> Stage:
        """One decision per candidate; needs no model."""
        numbers_only = self.gate is not None and self.gate.over_all
        pooled = self.gate is not None and self.gate.pool is not None
        decided = gate_stage(
            None if self.gate is None else self.gate.numbers,
            self.judges,
            candidates,
            verdicts,
            critiques,
            name=f"{self.decisions}-numbers" if numbers_only else self.decisions,
            first=self.first,
            cut=self.cut,
            humans=None if pooled else self.humans,
            fault=self.fault,
            fault_share=self.fault_share,
            rejected=self.rejected,
            scale=self.exit_rule.scale if isinstance(self.exit_rule, ExitRule) else None,
            escalation=self.exit_rule if isinstance(self.exit_rule, Escalation) else None,
            role="numbers of decisions" if numbers_only else "",
        )
        if self.gate is None or not numbers_only:
            return decided
        if pooled:
            return posterior_stage(self.gate, self.judges, decided, verdicts, self.humans, name=self.decisions)
        return certified_stage(self.gate, decided, name=self.decisions)

    def write(
        self,
        prompts: Stage,
        candidates: Stage,
        verdicts: Sequence[Stage],
        decisions: Stage,
        earlier: Sequence[Judged] = (),
    ) -> list[Stage]:
        """The rows, then the files. Raises ModelNotFound when the policy's tokenizer is not here.

        Args:
            earlier: see `dataset_rows`.
        """
        rows = dataset_rows(
            self.config,
            self.judges,
            self.policy,
            prompts,
            candidates,
            verdicts,
            decisions,
            name=self.rows,
            scale=self.scale,
            earlier=earlier,
        )
        return [
            rows,
            *(
                dataset_files(
                    config,
                    self.gate,
                    self.judges,
                    rows,
                    self.policy,
                    name=name,
                    view=self.view,
                    origin=self.origin,
                    trained_on=self.trained_on,
                    max_prompts=self.max_prompts,
                    keep=self.keep,
                )
                for name, config in self.files.items()
            ),
        ]
