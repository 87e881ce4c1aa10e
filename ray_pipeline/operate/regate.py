"""New thresholds on stored scores: a preview of what they would keep, then the gate and datasets rebuilt.

Scores are read from the run's own tables; no model is asked, no engine or cluster starts. The labels come from the
same function as in a run, and what is written carries the fingerprints that a run with these thresholds would give it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.dataset_files import kto_weights
from ray_pipeline.data.datasets import datasets
from ray_pipeline.data.decisions import gate
from ray_pipeline.data.gate import GateConfig, decide, label_counts
from ray_pipeline.graph.heartbeat import BEAT_SECONDS, Heartbeat
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.manifest import stage_entry
from ray_pipeline.graph.results import Run, StageRecord
from ray_pipeline.graph.resume import stage_folder
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Stage, WholeWork
from ray_pipeline.store.files import StoreError, point_at
from ray_pipeline.store.keys import digest
from ray_pipeline.store.schemas import LABELS
from ray_pipeline.workflow.stored import config_of

#: Blocks of the configuration that stored scores can be read again under.
_BLOCKS = ("gate.", "datasets.")


@dataclasses.dataclass
class Side:
    """What one set of thresholds keeps. `pairs` are prompts whose best desirable and worst undesirable candidate are
    min_gap apart; empty responses and token limits, which drop a few more rows, apply when datasets are written.
    """

    labels: dict[str, int]
    pairs: int

    @property
    def kept(self) -> int:
        return self.labels["desirable"] + self.labels["undesirable"]

    @property
    def weights(self) -> tuple[float, float] | None:
        """(desirable_weight, undesirable_weight) that KTO would need for these classes; None if one is empty."""
        return kto_weights(self.labels["desirable"], self.labels["undesirable"])


@dataclasses.dataclass
class Preview:
    """Old thresholds against new ones on the same scores. `moved` is (old label, new label) → candidates."""

    candidates: int
    old: Side
    new: Side
    moved: dict[tuple[str, str], int]


@dataclasses.dataclass(frozen=True)
class Regate:
    """A run, its configuration as it was, and as it would be."""

    run: Run
    before: Any
    after: Any


def regate(run: Run, overrides: Sequence[str]) -> Regate:
    """Read new thresholds.

    Raises:
        ConfigError: a key outside `gate` and `datasets`, an unknown key, or a run of another workflow.
        StoreError: the run has no scores yet.
    """
    if run.workflow != "dmapo":
        raise ConfigError(
            f"{run.folder.location} is a run of {run.workflow}; regate reads runs of dmapo. In a "
            "comparison, change baselines.data and run it again: no call is repeated"
        )
    for override in overrides:
        if not override.startswith(_BLOCKS):
            raise ConfigError(
                f"{override}: regate changes keys of gate and datasets alone, because stored scores answer no other; "
                "`quorum run` takes every key and repeats no call"
            )
    for name in ("prompts", "candidates", *_verdict_stages(run)):
        if name not in run.results:
            raise StoreError(f"{run.folder.location}: {name} is not done yet, so there is nothing to gate")
    before: Any = config_of(run)
    after: Any = config_of(run, overrides, "quorum regate")
    if after.gate.use_critic and "critic" not in run.results:
        raise StoreError(f"{run.folder.location}: critic is not done; run it, or add gate.use_critic=false")
    return Regate(run, before, after)


def _verdict_stages(run: Run) -> list[str]:
    return [name for name, stage in run.stages.items() if stage.role == "verdicts"]


# --- preview ----------------------------------------------------------------------------------------------------------


def preview(given: Regate) -> Preview:
    """Count both sides, one shard in memory at a time."""
    sides = {name: Side(dict.fromkeys(LABELS, 0), 0) for name in ("old", "new")}
    moved: collections.Counter[tuple[str, str]] = collections.Counter()
    candidates = 0
    for tables in _scores(given):
        old = _decide(tables, given.before)
        new = _decide(tables, given.after)
        candidates += new.num_rows
        for side, decisions, config in (("old", old, given.before), ("new", new, given.after)):
            for label, number in label_counts(decisions).items():
                sides[side].labels[label] += number
            sides[side].pairs += _pairs(decisions, config.datasets.min_gap)
        moved.update(zip(old["label"].to_pylist(), new["label"].to_pylist(), strict=True))
    return Preview(candidates, sides["old"], sides["new"], dict(moved))


def _scores(given: Regate) -> Iterator[dict[str, pa.Table | None]]:
    """Of each shard only what the gate reads: ids, scores, flaws."""
    results, judged = given.run.results, _verdict_stages(given.run)
    wants_critic = given.before.gate.use_critic or given.after.gate.use_critic
    critic = results["critic"].table() if wants_critic and "critic" in results else None
    for shard in range(given.run.num_shards):
        verdicts = [
            results[name].table().read(shard, ["candidate_id", "judge", "score", "parse_status"]) for name in judged
        ]
        yield {
            "candidates": results["candidates"].table().read(shard, ["candidate_id", "prompt_id"]),
            "verdicts": pa.concat_tables(verdicts),
            "critiques": None if critic is None else critic.read(shard, ["candidate_id", "flawed", "parse_status"]),
        }


def _decide(tables: Mapping[str, Any], config: Any) -> pa.Table:
    gate: GateConfig = config.gate
    critiques = tables["critiques"] if gate.use_critic else None
    return decide(tables["candidates"], tables["verdicts"], critiques, config.judge.names, gate)


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


def preview_lines(found: Preview) -> list[str]:
    """Old against new, for a terminal."""
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
    return [line.rstrip() for line in lines]


def _share(side: Side) -> str:
    return f"{side.labels['desirable'] / side.kept:.1%}" if side.kept else "–"


def _weights(side: Side) -> str:
    return "none" if side.weights is None else "{:.3g}:{:.3g}".format(*side.weights)


# --- write ------------------------------------------------------------------------------------------------------------


def write(given: Regate, say: Callable[[str], None], beat_seconds: float = BEAT_SECONDS) -> None:
    """Rebuild gate and datasets, and point the manifest, config.yaml and the `datasets` view at them.

    Output made from the earlier datasets (a policy, its evaluation) stays where it is; the manifest shows that it
    waits, because the next run remakes it.

    Raises:
        RunBusy: the run is being worked on.
        StageStop, ModelNotFound: a shard failed; the policy's tokenizer, which limits are counted with, is not here.
    """
    run, config = given.run, given.after
    made = _stages(given)
    with Heartbeat(run.folder, beat_seconds=beat_seconds, say=say):
        results = dict(run.results)
        make_here(made, Session(run.folder.location, run.calls_root, run.num_shards), results, say)
        before = run.folder.read_json("manifest.json")
        plain = config.model_dump(mode="json")
        manifest = {
            **before,
            "config": plain,
            "given": config.model_dump(mode="json", exclude_unset=True),
            "config_digest": digest(plain),
            "report": config.page().model_dump(mode="json"),
            "stages": _entries(before["stages"], made, results),
        }
        run.folder.write_bytes("config.yaml", yaml.safe_dump(plain, sort_keys=False).encode())
        run.folder.write_json("manifest.json", manifest)
        for stage in made:
            if stage.view:
                point_at(run.folder, stage.view, stage.folder_name)
            say(f"{stage.name}: {stage_folder(run.folder.location, stage).location}")


def _stages(given: Regate) -> list[Stage]:
    """Gate and datasets over the stored tables, wired as in the workflow."""
    config, entries = given.after, given.run.stages
    asked, answers = stored(entries, "prompts"), stored(entries, "candidates")
    verdicts = [stored(entries, name) for name in _verdict_stages(given.run)]
    critiques = stored(entries, "critic") if config.gate.use_critic else None
    base = config.models[config.train.model]
    decisions = gate(config.gate, config.judge.names, answers, verdicts, critiques)
    files = datasets(config.datasets, config.gate, config.judge.names, base, asked, answers, verdicts, decisions)
    return [decisions, files.inputs["rows"], files]


def stored(entries: Mapping[str, StageRecord], name: str) -> Stage:
    """A stage that is done, as an input: its fingerprint is what the manifest says, not computed from its settings,
    so that the weights that made it need not be here."""
    entry = entries[name]
    stage = Stage(name=name, work=WholeWork(_not_again, tables=entry.tables), config=None, group=entry.group)
    stage.__dict__["fingerprint"] = entry.fingerprint  # where the cached property keeps it
    return stage


def _not_again(given: Any) -> dict[str, Any]:
    raise AssertionError("a stored stage is never made")


def _entries(before: Mapping[str, Any], made: Sequence[Stage], results: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's stages: what was made, and what was made from its predecessors waiting again."""
    changed = {stage.name for stage in made if before.get(stage.name, {}).get("fingerprint") != stage.fingerprint}
    entries: dict[str, Any] = {}
    by_name = {stage.name: stage for stage in made}
    for name, entry in before.items():
        if name in by_name:
            stage, result = by_name[name], results[name]
            entries[name] = {**stage_entry(stage), "group": entry["group"], "status": "done", **result.plain()}
        elif changed & set(entry["inputs"].values()):
            changed.add(name)
            entries[name] = {
                **{key: value for key, value in entry.items() if key not in ("error", "rows", "facts", "usage")},
                "status": "waiting",
            }
        else:
            entries[name] = entry
    return entries
