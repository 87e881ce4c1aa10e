"""The input of a run's report. Only the run's identity is required: a part that is None is reported as missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ray_pipeline.data.checklist_stats import ChecklistStats
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.judge_votes import ErrorsOfJudges
from ray_pipeline.data.level_stats import EscalationStats
from ray_pipeline.data.reviewed import Reviewed
from ray_pipeline.evaluate.planned import PlannedUse
from ray_pipeline.evaluate.rounds import RoundStats
from ray_pipeline.stats.protocol import Protocol

if TYPE_CHECKING:  # importing torch and transformers takes seconds, and a report needs neither
    from ray_pipeline.policy.perplexity import Perplexity

DMAPO_STAGES = ("prompts", "candidates", "judge", "critic", "gate", "datasets", "train", "evaluate")


@dataclass(frozen=True)
class RunIdentity:
    """Which run this is. `fingerprints` is by stage; `models` is role → model identity (for display only).
    `stages` are the workflow's stages in order, so that missing ones can be named.
    """

    name: str
    workflow: str = "dmapo"
    config_digest: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    stages: Sequence[str] = DMAPO_STAGES


@dataclass(frozen=True)
class StageUse:
    """Usage of one stage, summed over its receipts. `calls` counts engine calls, `log_hits` calls answered from the
    call log; `errors` counts rows or shards that ended in an error; `cost` is in the unit of the prices; `cut_prompts`
    counts replies to prompts of which the server left out a part.
    """

    stage: str
    rows: int | None = None
    calls: int | None = None
    log_hits: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    seconds: float | None = None
    errors: int | None = None
    cost: float | None = None
    cut_prompts: int | None = None


@dataclass(frozen=True)
class ReportData:
    """Tables have the columns of `ray_pipeline.store.schemas`; only those named here are read, others may be left out.

    contamination      what each stage that compared texts with benchmarks found (`decontamination.Screen.facts`)
    prompt_counts      {"read": n, "kept": n, "dropped": {reason: n}}
    prompts            prompt_id, messages (for the examples only)
    candidates         candidate_id, prompt_id, completion_tokens, and response or response_chars; if known,
                       model and source_label
    verdicts           candidate_id, judge, score, parse_status
    critiques          flawed, failure_type, parse_status
    judge_errors       how far the judges err together
    checklists         how often their items are met
    decisions          candidate_id, prompt_id, label, mean_score, final_score, score_variance, why
    agreement_on       candidate ids to which kappa and alpha are limited (the audit slice where calls were skipped)
    escalation         what each level of `judge.escalate` took
    dataset_counts     {"kto": {"train": rows, "val": rows}, "dpo": {…}}: train + val is the size, other keys are shown
    dataset_guards     {reason: rows or pairs kept out}
    kto_weights        {"desirable_weight": w, "undesirable_weight": w}
    lengths            how the tokens of training rows were counted (`tokens.counted_with`)
    train_settings     effective trainer values, shown as they are
    train_metrics      step, split, and any of loss, rewards_margins, kl, rewards_accuracies, …
    comparisons        pair_id, prompt_id, judge, order, choice, parse_status; order "ab": A is the policy's answer
    responses          prompt_id, model, mode, response, completion_tokens, finish_reason; `correct` if known
    response_verdicts  prompt_id, judge, score, and model + mode (or candidate_id = response_id of `responses`)
    perplexity         model → Perplexity of held-out completions
    curating_models    judge of the data → model identity
    evaluating_models  judge of the comparisons → model identity
    candidate_model    name of the model that is trained and compared
    compared           judge of the comparisons → protocol of its win rates, as far as settings determine it
    stage_use          one StageUse per stage that ran
    benchmarks         scores of public benchmarks, as in `scores` of benchmarks.json
    config             the configuration as resolved, shown as it is
    people             labels that people gave to candidates
    gate               thresholds of the gate
    cards              key of a judge's model → the judges of its card
    certified          what a certified gate found, as its stage stored it
    posterior          what the pool of a gate found, as its stage stored it
    calls              location of the call log, for the messages that were sent
    planned            planned and actual usage by stage, where `quorum plan` was run
    rounds             figures of every round; empty for a run without rounds. The other parts are of the final one
    decided            facts of the newest decision whether rounds go on (`evaluate.early_stop`)
    """

    run: RunIdentity
    prompt_counts: Mapping[str, Any] | None = None
    contamination: Sequence[Mapping[str, Any]] = ()
    prompts: pa.Table | None = None
    candidates: pa.Table | None = None
    verdicts: pa.Table | None = None
    judge_errors: ErrorsOfJudges | None = None
    checklists: Sequence[ChecklistStats] = ()
    critiques: pa.Table | None = None
    decisions: pa.Table | None = None
    agreement_on: Sequence[str] | None = None
    escalation: EscalationStats | None = None
    dataset_counts: Mapping[str, Mapping[str, int]] | None = None
    dataset_guards: Mapping[str, int] | None = None
    kto_weights: Mapping[str, float] | None = None
    lengths: str | None = None
    train_settings: Mapping[str, Any] | None = None
    train_metrics: pa.Table | None = None
    comparisons: pa.Table | None = None
    responses: pa.Table | None = None
    response_verdicts: pa.Table | None = None
    perplexity: "Mapping[str, Perplexity] | None" = None
    curating_models: Mapping[str, str] = field(default_factory=dict)
    evaluating_models: Mapping[str, str] = field(default_factory=dict)
    candidate_model: str = ""
    compared: Mapping[str, Protocol] = field(default_factory=dict)
    stage_use: Sequence[StageUse] | None = None
    benchmarks: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] | None = None
    planned: Sequence[PlannedUse] = ()
    rounds: Sequence[RoundStats] = ()
    decided: Mapping[str, Any] | None = None
    calls: str = ""
    people: Reviewed | None = None
    gate: GateConfig = field(default_factory=GateConfig)
    certified: Mapping[str, Any] | None = None
    posterior: Mapping[str, Any] | None = None
    cards: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    desirable_from: float = 7.0
    undesirable_to: float = 4.0
    bootstrap_draws: int = 2000
    bootstrap_seed: int = 0

    @property
    def trains(self) -> bool:
        """Whether the workflow trains a policy; otherwise the report is about the data alone."""
        return "train" in self.run.stages

    def missing_stages(self) -> list[str]:
        """Stages of the workflow without output to report, in the workflow's order."""
        parts: dict[str, Any] = {
            "prompts": self.prompt_counts if self.prompt_counts is not None else self.prompts,
            "candidates": self.candidates,
            "judge": self.verdicts,
            "critic": self.critiques,
            "gate": self.decisions,
            "datasets": self.dataset_counts,
            "train": self.train_metrics,
            "evaluate": self.comparisons if self.comparisons is not None else self.responses,
        }
        return [stage for stage in self.run.stages if stage in parts and parts[stage] is None]
