"""Small runs whose every number is planted: prompts, answers, scores, and a tokenizer that counts words."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_pipeline.audit.findings import RunTables
from ray_pipeline.data.card import Provenance
from ray_pipeline.data.confidence import panel_confidence
from ray_pipeline.data.convert import pairs_to_sft
from ray_pipeline.data.dataset_files import write_dataset_files
from ray_pipeline.data.dataset_rows import DatasetsConfig, dpo_rows, kto_rows
from ray_pipeline.data.early_exit import outside_slice
from ray_pipeline.data.escalation import Escalation, decide_by_level
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.data.rows import add_counts
from ray_pipeline.store import keys, schemas
from ray_pipeline.store.tables import ShardedTable

JUDGES = ["helpfulness", "factuality", "conciseness"]

#: An answer, the judges' scores (None: unread) and the critic's word (None: unread).
Planted = tuple[str | None, Sequence[float | None], bool | None]


@dataclasses.dataclass
class World:
    """Tables of one shard or one run."""

    prompts: pa.Table
    candidates: pa.Table
    verdicts: pa.Table
    critiques: pa.Table

    def shuffled(self, seed: int) -> World:
        """The same rows in another order, each table in its own."""
        rng = random.Random(seed)
        return World(*(shuffle(getattr(self, f.name), rng) for f in dataclasses.fields(self)))


def shuffle(table: pa.Table, rng: random.Random) -> pa.Table:
    return table.take(pa.array(rng.sample(range(table.num_rows), table.num_rows), pa.int64()))


def candidate_name(prompt: str, k: int) -> str:
    return keys.candidate_id(prompt, {"model": "planted"}, {}, k)


def make_world(answers: dict[str, list[Planted]], judges: Sequence[str] = JUDGES, val: Sequence[str] = ()) -> World:
    """`answers` is prompt text → answers; prompts of `val` are held out."""
    prompts, candidates, verdicts, critiques = [], [], [], []
    for text, planted in answers.items():
        messages = [{"role": "user", "content": text}]
        prompt = keys.prompt_id(messages)
        split = "val" if text in val else "train"
        prompts.append(
            {"prompt_id": prompt, "messages": messages, "source": "s", "task_type": "t", "split": split, "meta": "{}"}
        )
        for k, (response, scores, flawed) in enumerate(planted):
            ids = {"candidate_id": candidate_name(prompt, k), "prompt_id": prompt}
            candidates.append(
                {**ids, "k": k, "seed": k, "response": response, "finish_reason": "stop", "generator": "planted"}
            )
            for judge, score in zip(judges, scores, strict=True):
                status = "ok" if score is not None else "unparsed"
                verdicts.append({**ids, "judge": judge, "score": score, "parse_status": status})
            critiques.append({**ids, "flawed": flawed, "parse_status": "ok" if flawed is not None else "truncated"})
    return World(
        schemas.to_table(prompts, schemas.PROMPTS),
        schemas.to_table(candidates, schemas.CANDIDATES),
        schemas.to_table(verdicts, schemas.VERDICTS),
        schemas.to_table(critiques, schemas.CRITIQUES),
    )


def ended(world: World, *reasons: str) -> World:
    """The same answers with these finish reasons."""
    at = world.candidates.schema.get_field_index("finish_reason")
    column = pa.array([reasons[i % len(reasons)] for i in range(world.candidates.num_rows)])
    field = world.candidates.schema.field(at)
    return dataclasses.replace(world, candidates=world.candidates.set_column(at, field, column))


def skipped_by_levels(world: World, rule: Escalation) -> World:
    """The same verdicts without those of judges whose level was not reached, as the stages of the levels leave them."""
    verdicts = world.verdicts.to_pylist()
    for number in range(1, len(rule.levels)):
        before = rule.model_copy(update={"levels": rule.levels[:number]})
        known = outside_slice(world.candidates, [schemas.to_table(verdicts, schemas.VERDICTS)])
        settled = {name for name, found in known.items() if before.settled(found)}
        for row in verdicts:
            if row["judge"] in rule.levels[number] and row["candidate_id"] in settled:
                row |= {"score": None, "parse_status": "skipped"}
    return dataclasses.replace(world, verdicts=schemas.to_table(verdicts, schemas.VERDICTS))


def random_world(prompts: int, seed: int, k: int = 4) -> World:
    """Scores drawn so that every label occurs often."""
    rng = random.Random(seed)
    answers: dict[str, list[Planted]] = {}
    for i in range(prompts):
        row: list[Planted] = []
        for j in range(k):
            level = rng.choice([2, 3, 5, 8, 9])
            scores = [None if rng.random() < 0.02 else level + rng.choice([-1, 0, 0, 1, 1]) for _ in JUDGES]
            if rng.random() < 0.1:
                scores[0] = 1
            row.append((f"answer {j} to {i}", scores, rng.choice([False, False, True, None])))
        answers[f"question {i}"] = row
    return make_world(answers, val=[f"question {i}" for i in range(0, prompts, 7)])


def count_words(messages: Sequence[Any], completion: Sequence[Any] | None = None) -> list[int]:
    """One token a word, two for each message around it; equal words have equal ids in every process."""
    chat = [*messages, *(completion or ())]
    text = " ".join(f"<{m['role']}> {m['content']} <end>" for m in chat)
    text += " <assistant>" if completion is None else ""
    return [int(keys.digest(word, size=3), 16) for word in text.split()]


def by_shard(table: pa.Table, num_shards: int) -> list[pa.Table]:
    homes = [keys.shard_of(p, num_shards) for p in table["prompt_id"].to_pylist()]
    return [
        table.take(pa.array([i for i, home in enumerate(homes) if home == shard], pa.int64()))
        for shard in range(num_shards)
    ]


def write_run(
    folder: Path,
    world: World,
    gate: GateConfig | None = None,
    config: DatasetsConfig | None = None,
    num_shards: int = 2,
    change: Callable[[str, int, pa.Table], pa.Table] = lambda kind, shard, table: table,
    fingerprint: str = "f2",
    origin: Provenance | None = None,
    max_prompts: int | None = None,
    sizes: Sequence[Mapping[str, Mapping[str, int]]] = (),
    rule: Escalation | None = None,
) -> RunTables:
    """A whole run on disk, made by the real stages. `change` may damage a shard after the stages that read it; with a
    `rule` (whose gate is `gate`), judges of later levels are skipped."""
    world = world if rule is None else skipped_by_levels(world, rule)
    gate, config = gate or GateConfig(), config or DatasetsConfig(max_length=60, max_prompt_length=20)
    tables = {
        kind: ShardedTable(str(folder / kind), kind, num_shards, "f1")
        for kind in ("prompts", "candidates", "verdicts", "critiques", "decisions")
    }
    parts = {kind: by_shard(getattr(world, kind), num_shards) for kind in tables if kind != "decisions"}
    made: dict[str, list[pa.Table]] = {"kto": [], "dpo": [], "sft": []}
    counts: dict[str, list[dict]] = {"kto": [], "dpo": [], "sft": []}
    for shard in range(num_shards):
        shards = {kind: part[shard] for kind, part in parts.items()}
        judged = (shards["candidates"], shards["verdicts"], shards["critiques"])
        decisions = decide(*judged, JUDGES, gate) if rule is None else decide_by_level(*judged, rule)[0]
        arguments = (shards["prompts"], shards["candidates"], shards["verdicts"], decisions, config, count_words)
        pairs = dpo_rows(*arguments)
        for kind, (table, count) in (
            ("kto", kto_rows(*arguments)), ("dpo", pairs), ("sft", pairs_to_sft(pairs[0])),
        ):  # fmt: skip
            made[kind].append(change(kind, shard, table))
            counts[kind].append(count)
        for kind, table in {**shards, "decisions": decisions}.items():
            tables[kind].write(shard, change(kind, shard, table))
    write_dataset_files(
        str(folder / "datasets"),
        made,
        config,
        fingerprint=fingerprint,
        counts={kind: add_counts(c) for kind, c in counts.items()},
        gate=gate,
        judges=JUDGES,
        lineage={"gate": "f1"},
        origin=origin,
        max_prompts=max_prompts,
        confidence=[panel_confidence(world.candidates, world.verdicts, JUDGES, (1, 10))] if config.weights else None,
        sizes=sizes,
    )
    return RunTables(
        prompts=tables["prompts"],
        candidates=tables["candidates"],
        verdicts=[tables["verdicts"]],
        critiques=tables["critiques"],
        decisions=tables["decisions"],
        datasets=str(folder / "datasets"),
        judges=JUDGES,
        gate=gate,
        config=config,
        levels=() if rule is None else rule.levels,
        scale=(1, 10),
    )
