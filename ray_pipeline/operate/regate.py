"""New thresholds on stored scores: a preview of what they would keep, then the gate and datasets rebuilt.

Scores are read from the run's own tables; no model is asked, no engine or cluster starts. The labels come from the
same function as in a run, and rebuilding is a run of the gate and dataset stages in this process, so what is written
carries the fingerprints that a run with these thresholds would give it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.dataset_files import kto_weights, of_prompts
from ray_pipeline.data.dataset_rows import DatasetsConfig, kto_rows
from ray_pipeline.data.datasets import cut_to_size
from ray_pipeline.data.decisions import decide_shard
from ray_pipeline.data.early_exit import ExitRule
from ray_pipeline.data.gate import label_counts
from ray_pipeline.data.scored import ScoredDataset
from ray_pipeline.data.tokens import Encode, token_counter
from ray_pipeline.graph.driver import execute
from ray_pipeline.graph.heartbeat import BEAT_SECONDS
from ray_pipeline.graph.in_process import InProcessExecutor
from ray_pipeline.graph.results import Run, of_role, stored_stages
from ray_pipeline.graph.stage import Dag, ShardInput, ShardOutput, ShardWork, Stage, StageStop
from ray_pipeline.operate.run_settings import run_settings
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.schemas import KTO, LABELS, VERDICTS
from ray_pipeline.workflow.config import RunConfig
from ray_pipeline.workflow.stored import stored

#: What a decision reads of each input; texts are left out.
_COLUMNS = {
    "candidates": ["candidate_id", "prompt_id", "k", "finish_reason"],
    "verdicts": ["candidate_id", "judge", "score", "parse_status"],
    "critiques": ["candidate_id", "flawed", "parse_status"],
}
#: What is counted of a KTO row.
_ROW = ["prompt_id", "split", "label"]
#: Label of a candidate that a dataset leaves out.
_UNUSED = "unused"


@dataclasses.dataclass
class Side:
    """What one set of thresholds keeps.

    Attributes:
        pairs: prompts whose best desirable and worst undesirable candidate are min_gap apart; empty responses and token
            limits, which drop a few more, apply when datasets are written.
        classes: desirable and undesirable KTO rows of the training split as the datasets stage would write them; None
            if it writes no KTO rows, or if the policy's tokenizer, which limits are counted with, is not here.
    """

    labels: dict[str, int]
    pairs: int
    classes: tuple[int, int] | None

    @property
    def kept(self) -> int:
        return self.labels["desirable"] + self.labels["undesirable"]

    @property
    def weights(self) -> tuple[float, float] | None:
        """(desirable_weight, undesirable_weight) that KTO would train with; None if a class is empty or not known."""
        return None if self.classes is None else kto_weights(*self.classes)


@dataclasses.dataclass
class Preview:
    """Old thresholds against new ones on the same scores.

    Attributes:
        moved: (old label, new label) → candidates.
        skipped: candidates of which skipped calls matter under the new thresholds; `key` skipped them.
    """

    candidates: int
    old: Side
    new: Side
    moved: dict[tuple[str, str], int]
    skipped: int = 0
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Sources:
    """The stored stages that a dataset is made from."""

    prompts: Stage
    candidates: Stage
    verdicts: list[Stage]
    critiques: Stage | None

    def decide(self, dataset: ScoredDataset) -> Stage:
        return dataset.decide(self.candidates, self.verdicts, self.critiques)


@dataclasses.dataclass(frozen=True)
class Rules:
    """A dataset as it was and as it would be, over the same sources."""

    sources: Sources
    before: ScoredDataset
    after: ScoredDataset


@dataclasses.dataclass(frozen=True)
class Regate:
    """A run, its configuration with new thresholds, and its datasets by the stage that decides.

    Attributes:
        cut: stages that cut such datasets to a size, which a preview does not.
    """

    run: Run
    config: RunConfig
    datasets: dict[str, Rules]
    cut: Sequence[str] = ()


def regate(run: Run, overrides: Sequence[str]) -> Regate:
    """Read new thresholds.

    Raises:
        ConfigError: a key outside the thresholds, an unknown key, another set of datasets, or a run of a workflow
            without a gate.
        StoreError: the run has no scores yet.
    """
    typed = stored(run)
    workflow = typed.workflow
    if workflow.scored is None:
        raise ConfigError(
            f"{run.folder.location} is a run of {run.workflow}, which has no gate; change its configuration and rerun "
            "it: no call is repeated"
        )
    for override in overrides:
        if not override.startswith(workflow.thresholds):
            keys = " and ".join(prefix.rstrip(".") for prefix in workflow.thresholds)
            raise ConfigError(
                f"{override}: regate changes keys of {keys} alone, because stored scores answer no other; "
                "`quorum run` takes every key and repeats no call"
            )
    if any(stage.round > 1 for stage in run.stages.values()):
        raise ConfigError(
            "regate does not rebuild rounds: with other thresholds, another policy answers from round 2 on; use "
            "`quorum run` with the same overrides, which repeats no call"
        )
    config = typed.changed(overrides, "quorum regate")
    before = {dataset.decisions: dataset for dataset in workflow.scored(typed.config)}
    after = {dataset.decisions: dataset for dataset in workflow.scored(config)}
    if after.keys() != before.keys() or not after.keys() <= run.stages.keys():
        raise ConfigError(
            f"regate rebuilds the datasets that the run has ({', '.join(before)}), and adds and removes none; use "
            "`quorum run` for others"
        )
    if any(one.gate is not None and one.gate.over_all for one in (*before.values(), *after.values())):
        raise ConfigError(
            "regate does not rebuild a certified gate or one with a pool; use `quorum run` with the same overrides, "
            "which repeats no call"
        )
    if not after:
        raise StoreError(f"{run.folder.location} has no dataset made from its own scores, so there is nothing to gate")
    stages = stored_stages(run)
    datasets = {key: Rules(_sources(run, stages, one), before[key], one) for key, one in after.items()}
    return Regate(run, config, datasets, cut_to_size(run))


def _sources(run: Run, stages: Mapping[str, Stage], dataset: ScoredDataset) -> Sources:
    """What the stored stages of a dataset read. Raises StoreError if one is not done."""
    decided = run.stages[dataset.decisions].inputs
    needed = {
        "prompts": run.stages[dataset.rows].inputs["prompts"],
        **{role: name for role, name in decided.items() if role != "critiques"},
    }
    for name in needed.values():
        if name not in run.results:
            raise StoreError(f"{run.folder.location}: {name} is not done yet, so there is nothing to gate")
    critiques = next((result.name for result in of_role(run.results, "critiques")), None)
    if dataset.gate is not None and dataset.gate.use_critic and critiques is None:
        raise StoreError(f"{run.folder.location}: critic is not done; run it, or add gate.use_critic=false")
    return Sources(
        stages[needed["prompts"]],
        stages[needed["candidates"]],
        [stages[name] for role, name in needed.items() if role.startswith("verdicts/")],
        None if critiques is None else stages[critiques],
    )


# --- preview ----------------------------------------------------------------------------------------------------------


def preview(given: Regate) -> dict[str, Preview]:
    """Count both sides of every dataset, by the stage that decides; one shard in memory at a time."""
    return {name: _preview(given.run, rules) for name, rules in given.datasets.items()}


def _preview(run: Run, rules: Rules) -> Preview:
    datasets = rules.before, rules.after
    encoders = [_encoder(dataset) for dataset in datasets]
    sides = [Side(dict.fromkeys(LABELS, 0), 0, None) for _ in datasets]
    rows = [[KTO.empty_table().select(_ROW)] for _ in datasets]
    moved: collections.Counter[tuple[str, str]] = collections.Counter()
    candidates = skipped = 0
    for shard, (ids, lacking, *decided) in enumerate(_decisions(run, rules)):
        candidates += len(ids)
        skipped += lacking
        labels = []
        for side, decisions, dataset, encode, kept in zip(sides, decided, datasets, encoders, rows, strict=True):
            for label, number in label_counts(decisions).items():
                side.labels[label] += number
            side.pairs += _pairs(decisions, dataset.config.min_gap)
            if encode is not None:
                kept.append(_kto_rows(run, rules.sources, shard, decisions, dataset.config, encode))
            labels.append(dict(zip(decisions["candidate_id"].to_pylist(), decisions["label"].to_pylist(), strict=True)))
        moved.update(tuple(of.get(name, _UNUSED) for of in labels) for name in ids.to_pylist())
    for side, dataset, encode, kept in zip(sides, datasets, encoders, rows, strict=True):
        if encode is not None and dataset.keep == "random":  # other orders need more than the rows' keys
            side.classes = _classes(pa.concat_tables(kept), dataset.max_prompts)
    key = "" if rules.after.exit_rule is None else rules.after.exit_rule.key
    return Preview(candidates, sides[0], sides[1], dict(moved), skipped, key)


def _encoder(dataset: ScoredDataset) -> Encode | None:
    """What counts the tokens of KTO rows; None if there are none, or if the tokenizer is not here."""
    if "kto" not in dataset.config.kinds:
        return None
    try:
        return token_counter(None if dataset.policy is None else dataset.policy.tokenizer)
    except (OSError, ValueError):
        return None


def _kto_rows(
    run: Run, sources: Sources, shard: int, decisions: pa.Table, config: DatasetsConfig, encode: Encode
) -> pa.Table:
    """KTO rows of a shard without their texts, by the function that makes them."""
    prompts, candidates = (run.results[of.name].table().read(shard) for of in (sources.prompts, sources.candidates))
    rows, _ = kto_rows(prompts, candidates, VERDICTS.empty_table(), decisions, config, encode)
    return rows.select(_ROW)


def _classes(rows: pa.Table, max_prompts: int | None) -> tuple[int, int]:
    """Desirable and undesirable rows of the training split."""
    rows = rows if max_prompts is None else of_prompts(rows, max_prompts)
    labels = rows.filter(pc.equal(rows["split"], "train"))["label"]
    desirable: int = pc.sum(labels).as_py() or 0
    return desirable, len(labels) - desirable


def _decisions(run: Run, rules: Rules) -> Iterator[tuple[pa.ChunkedArray, int, pa.Table, pa.Table]]:
    """Of each shard: candidates' ids, how many new decisions lack skipped calls, the old decisions, the new ones."""
    stages = [rules.sources.decide(dataset) for dataset in (rules.before, rules.after)]
    inputs = {role: parent.name for stage in stages for role, parent in stage.inputs.items()}
    for shard in range(run.num_shards):
        tables = {
            role: run.results[name].table().read(shard, _COLUMNS[role.split("/")[0]]) for role, name in inputs.items()
        }
        old, new = (_decide(stage, tables, shard, run.num_shards) for stage in stages)
        decisions = new.tables["decisions"]
        lacking = new.counts.get("depends_on_skipped", 0)
        if isinstance(rules.after.exit_rule, ExitRule) and rules.after.exit_rule.exact == "scores":
            kept = pc.is_in(pc.field("label"), value_set=pa.array(["desirable", "undesirable"]))
            lacking += decisions.filter(kept)["final_score"].null_count
        yield tables["candidates"]["candidate_id"], lacking, old.tables["decisions"], decisions


def _decide(stage: Stage, tables: Mapping[str, pa.Table], shard: int, num_shards: int) -> ShardOutput:
    assert isinstance(stage.work, ShardWork)
    read = {role: tables[role] for role in stage.inputs}
    given = ShardInput(shard, num_shards, read, {}, None, stage.work.settings, _nothing, _nothing)
    return decide_shard(given)


def _nothing(*given: Any) -> None:
    pass


def _pairs(decisions: pa.Table, min_gap: float) -> int:
    """Prompts whose highest desirable and lowest undesirable final score are at least `min_gap` apart."""
    ends = {}
    for label, end in (("desirable", "max"), ("undesirable", "min")):
        of_label = decisions.filter(pc.equal(decisions["label"], label)).select(["prompt_id", "final_score"])
        grouped = of_label.group_by("prompt_id").aggregate([("final_score", end)])
        ends[label] = grouped.rename_columns(
            [label if name == f"final_score_{end}" else name for name in grouped.schema.names]
        )
    both = ends["desirable"].join(ends["undesirable"], "prompt_id", join_type="inner")
    # Subtracted float by float, as the datasets stage does, so that a gap exactly at the limit counts the same.
    gap = np.asarray(both["desirable"], dtype=float) - np.asarray(both["undesirable"], dtype=float)
    return int((gap >= min_gap).sum())


def preview_lines(found: Mapping[str, Preview]) -> list[str]:
    """Old against new for a terminal, dataset by dataset."""
    lines: list[str] = []
    for name, counted in found.items():
        lines += [*([""] if lines else []), *([f"{name}:"] if len(found) > 1 else []), *_lines(counted)]
    return lines


def _lines(found: Preview) -> list[str]:
    lines = [f"{found.candidates} candidates", "", f"{'':<24}{'old':>10}{'new':>10}{'change':>10}"]

    def row(name: str, old: int, new: int) -> str:
        return f"{name:<24}{old:>10}{new:>10}{new - old:>+10}"

    old, new = found.old, found.new
    lines += [row(label, old.labels[label], new.labels[label]) for label in LABELS]
    lines += [row("kept", old.kept, new.kept), row("pairs", old.pairs, new.pairs)]
    lines.append(f"{'desirable of kept':<24}{_share(old):>10}{_share(new):>10}")
    lines.append(f"{'KTO weights':<24}{_weights(old):>10}{_weights(new):>10}")
    changed = sorted(((n, a, b) for (a, b), n in found.moved.items() if a != b), reverse=True)
    lines += ["", *(f"{n} candidates {a} → {b}" for n, a, b in changed)] if changed else ["", "no label changes"]
    if found.skipped:
        lines.append(
            f"{found.skipped} candidates need calls that {found.key} skipped: their label or final score is open, "
            "and an open label counts as incomplete here; `quorum run` with the same overrides makes these calls alone"
        )
    return [line.rstrip() for line in lines]


def _share(side: Side) -> str:
    return f"{side.labels['desirable'] / side.kept:.1%}" if side.kept else "–"


def _weights(side: Side) -> str:
    if side.classes is None:
        return "–"
    return "none" if side.weights is None else "{:.3g}:{:.3g}".format(*side.weights)


# --- write ------------------------------------------------------------------------------------------------------------


def write(given: Regate, console: Console | None = None, beat_seconds: float = BEAT_SECONDS) -> None:
    """Run the gate and dataset stages; config.yaml, the manifest and the views follow as in any run.

    Output made from the earlier datasets (a policy, its evaluation) stays where it is; the manifest shows that it
    waits, because the next run remakes it.

    Raises:
        ConfigError: other calls are skipped under the new thresholds of the gate.
        RunBusy: the run is active.
        StageStop, ModelNotFound: a stage failed; the policy's tokenizer, which limits are counted with, is not here.
    """
    run, stages = given.run, list[Stage]()
    for rules in given.datasets.values():
        if rules.after.exit_rule is not None and rules.after.gate != rules.before.gate:
            raise ConfigError(
                f"{rules.after.exit_rule.key} skipped calls by the thresholds of the gate, so other thresholds may "
                "need them; "
                "`quorum run` with the same overrides makes the missing calls alone and repeats none"
            )
        sources, decisions = rules.sources, rules.sources.decide(rules.after)
        stages += rules.after.write(sources.prompts, sources.candidates, sources.verdicts, decisions)
    settings = run_settings(
        given.config,
        run.folder.location,
        calls_root=run.calls_root,
        workflow=run.reference,
        partial=True,
        beat_seconds=beat_seconds,
    )
    outcome = execute(Dag(run.workflow, stages), settings, InProcessExecutor(), console=console)
    for name, failure in outcome.failures.items():
        raise StageStop(f"{name} failed: {failure.reason}")
