"""Training files: kept rows of all shards in training order, in numbered files with a dataset card and `stats.json`.

TRL feeds KTO rows in the order of the file, so the order is made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from ray_pipeline.data.dataset_rows import SPLITS, DatasetsConfig, Kind
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.rows import Rows, flat_counts, gather, one_array, refuse_repeats
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import unit_hash
from ray_pipeline.store.markdown import key_table
from ray_pipeline.store.schemas import TABLES

#: Key columns of each kind of row.
_KEYS: dict[Kind, tuple[str, ...]] = {
    "kto": ("candidate_id",),
    "dpo": ("prompt_id", "chosen_id", "rejected_id"),
    "sft": ("candidate_id",),
}


# --- training order ---------------------------------------------------------------------------------------------------


def training_order(table: pa.Table, kind: Kind, seed: int) -> Rows:
    """Row numbers in training order; depends on the rows and the seed alone, not on their order in `table`.

    DPO and SFT rows are shuffled by hash(seed, ids). KTO rows are shuffled within each class, then the two classes are
    interleaved so that any w consecutive rows hold w·n_desirable/n desirable ones, rounded up or down: every batch has
    about the ratio of the whole.
    """
    ids = zip(*(table[name].to_pylist() for name in _KEYS[kind]), strict=True)
    keys = [(unit_hash(seed, *row), row) for row in ids]
    shuffled = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    if kind != "kto":
        return shuffled
    label = np.asarray(one_array(table["label"]).to_numpy(zero_copy_only=False), dtype=bool)
    n, desirable = len(label), int(label.sum())
    # Position t takes a desirable row where the running sum of t·n_d/n passes a whole number (Bresenham's line).
    steps = np.arange(n + 1, dtype=np.int64) * desirable // max(n, 1)
    takes = np.diff(steps).astype(bool)
    order = np.empty(n, dtype=np.int64)
    order[takes] = shuffled[label[shuffled]]
    order[~takes] = shuffled[~label[shuffled]]
    return order


def kto_weights(n_desirable: int, n_undesirable: int) -> tuple[float, float] | None:
    """(desirable_weight, undesirable_weight) for classes of these sizes; None if one is empty.

    Eq. (8) of the KTO paper (arXiv 2402.01306) wants w_d·n_d / (w_u·n_u) in [1, 4/3]; TRL 1.16 warns outside
    [1, 1.33]. (1, 1) where that holds already; else the smaller class gets the weight that makes the ratio 7/6,
    the middle, where TRL's rounding to two digits cannot matter.
    """
    if n_desirable < 1 or n_undesirable < 1:
        return None
    ratio = n_desirable / n_undesirable
    if 1 <= ratio <= 1.33:
        return 1.0, 1.0
    middle = 7 / 6
    if ratio < 1:
        return round(middle / ratio, 4), 1.0
    return 1.0, round(ratio / middle, 4)


# --- files ------------------------------------------------------------------------------------------------------------


def write_dataset_files(
    folder: str | Folder,
    tables: Mapping[str, Iterable[pa.Table]],
    config: DatasetsConfig,
    *,
    fingerprint: str,
    counts: Mapping[str, Mapping[str, Any]],
    gate: GateConfig | None,
    judges: Sequence[str],
    lineage: Mapping[str, str] | None = None,
    license: str = "other",
    origin: str | None = None,
) -> dict[str, Any]:
    """Write `<folder>/<kind>/{train,val}/part-00000.parquet …`, a README.md for each kind, and stats.json last.

    Args:
        tables: kind → tables of the shards, in any order; only these kept rows are held in memory.
        fingerprint: of the stage; goes into the footer of every file.
        counts: kind → sum of the shards' counts (`rows.add_counts`).
        gate: thresholds that made the labels, for the card; None where no gate did.
        lineage: stage → fingerprint of what the rows were made from, for the card.
        license: of the card, as the Hub spells it ("apache-2.0", "cc-by-4.0" …).
        origin: origin of the preferences, for the card; default: the consensus of the judges.

    Returns:
        Content of stats.json: `rows` (kind → rows of each split, for KTO of each class too), `counts`,
        `kto_weights` ({desirable_weight, undesirable_weight}, of the train split; None if a class is empty),
        `gate`, `judges`, `lineage`, `settings` and `fingerprint`. It contains no paths and no times.

    Raises:
        ValueError: a table does not have the schema of its kind, or a kind of `config.kinds` has no tables.
        KeyMismatch: a row occurs twice.
    """
    folder = Folder(folder) if isinstance(folder, str) else folder
    stats: dict[str, Any] = {
        "fingerprint": fingerprint,
        "rows": {},
        "counts": {kind: dict(counts[kind]) for kind in config.kinds},
        "kto_weights": None,
        "gate": None if gate is None else gate.model_dump(mode="json"),
        "judges": list(judges),
        "lineage": dict(lineage or {}),
        "settings": config.model_dump(mode="json"),
    }
    for kind in config.kinds:
        if kind not in tables:
            raise ValueError(f"datasets.kinds contains {kind}, but there are no {kind} tables")
        table = _all_rows(kind, tables[kind])
        rows: dict[str, int] = {}
        for split in SPLITS:
            part = gather(table, np.flatnonzero(np.asarray(pc.equal(one_array(table["split"]), split))))
            _write_split(folder / kind / split, kind, part, config, fingerprint)
            rows[split] = part.num_rows
            if kind == "kto":
                rows[f"{split}_desirable"] = pc.sum(part["label"]).as_py() or 0
                rows[f"{split}_undesirable"] = rows[split] - rows[f"{split}_desirable"]
        stats["rows"][kind] = rows
        if kind == "kto" and (weights := kto_weights(rows["train_desirable"], rows["train_undesirable"])):
            stats["kto_weights"] = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
        (folder / kind).write_bytes("README.md", _card(kind, stats, license, origin).encode())
    folder.write_json("stats.json", stats)
    return stats


def _all_rows(kind: str, tables: Iterable[pa.Table]) -> pa.Table:
    schema = TABLES[kind]
    parts = [schema.empty_table()]
    for table in tables:
        if not table.schema.equals(schema):
            raise ValueError(f"a {kind} table must have the schema\n{schema}\nnot\n{table.schema}")
        parts.append(table)
    table = pa.concat_tables(parts)
    if kind == "dpo":
        pairs = pc.binary_join_element_wise(one_array(table["chosen_id"]), one_array(table["rejected_id"]), " over ")
        refuse_repeats(pairs, "dpo: pair")
    else:
        refuse_repeats(one_array(table["candidate_id"]), f"{kind}: candidate_id")
    return table


def _write_split(folder: Folder, kind: Kind, table: pa.Table, config: DatasetsConfig, fingerprint: str) -> None:
    """Numbered files in training order. A split without rows still gets one file, so that readers find its columns."""
    order = training_order(table, kind, config.seed)
    written = []
    for number, start in enumerate(range(0, max(len(order), 1), config.rows_per_file)):
        name = f"part-{number:05d}.parquet"
        part = gather(table, order[start : start + config.rows_per_file]).combine_chunks()
        folder.write_table(name, part, fingerprint=fingerprint, kind=kind)
        written.append(name)
    for name in folder.names(".parquet"):
        if name not in written:  # of an earlier attempt; a loader would read it
            folder.delete(name)


# --- dataset card -----------------------------------------------------------------------------------------------------

_COLUMNS = {
    "kto": {
        "prompt": "chat messages up to the user's last turn",
        "completion": "the answer, as one assistant message",
        "label": "true: desirable, false: undesirable",
        "final_score": "f, mean of the judges' scores after the critic's penalty",
        "scores": "each judge and its score",
        "candidate_id, prompt_id": "keys of the run's other tables",
        "split": "train or val; follows from the prompt's hash",
    },
    "dpo": {
        "prompt": "chat messages up to the user's last turn",
        "chosen": "the desirable answer of the highest final score, as one assistant message",
        "rejected": "the undesirable answer of the lowest final score, likewise",
        "chosen_score, rejected_score": "their final scores",
        "score_gap": "chosen_score - rejected_score",
        "prompt_id, chosen_id, rejected_id": "keys of the run's other tables",
        "split": "train or val; follows from the prompt's hash",
    },
    "sft": {
        "prompt": "chat messages up to the user's last turn",
        "completion": "the chosen answer of the prompt's pair, as one assistant message",
        "final_score": "its final score",
        "candidate_id, prompt_id": "keys of the run's other tables",
        "split": "train or val; follows from the prompt's hash",
    },
}


def _card(kind: str, stats: Mapping[str, Any], license: str, origin: str | None) -> str:
    """README.md with the front matter by which `datasets.load_dataset(folder)` finds the splits."""
    rows, counts, gate = stats["rows"][kind], stats["counts"][kind], stats["gate"]
    front: dict[str, Any] = {
        "pretty_name": f"Quorum {kind.upper()} data",
        "license": license,
        "task_categories": ["text-generation"],
        "tags": ["quorum", "preference", "rlaif", "trl", kind],
        "size_categories": [_size_category(rows["train"] + rows["val"])],
    }
    # `datasets` 5.2 fails on a split without rows, so the card names only those that have some.
    named = {"train": "train", "val": "validation"}
    files = [{"split": named[split], "path": f"{split}/*.parquet"} for split in SPLITS if rows[split]]
    if files:
        # `datasets` 5.2 caches a local folder by its name and that of the configuration, whatever its files contain:
        # under a fixed name it would return the rows of another run with the same folder name.
        front["configs"] = [{"config_name": stats["fingerprint"], "data_files": files}]
    columns = _COLUMNS[kind]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# Quorum {kind.upper()} data",
        "",
        f"{origin or _consensus(stats['judges'])}, ready for TRL's `{kind.upper()}Trainer`. "
        "Rows are in training order.",
        "",
        "```python",
        "from datasets import load_dataset",
        f'data = load_dataset("path/to/{kind}")  # splits: {", ".join(f["split"] for f in files) or "none, no row"}',
        "```",
        "",
        *key_table("Columns", columns),
        *key_table("Rows", rows),
        *key_table("Kept and left out", flat_counts(counts, between=": ")),
        *(key_table("Gate", gate) if gate else ()),
        *key_table("Limits and order", stats["settings"]),
    ]
    if kind == "kto":
        weights = stats["kto_weights"] or {"none": "a class is empty, KTO cannot be trained"}
        lines += key_table("Class weights for KTO", weights)
    lines += key_table("Made from", {**stats["lineage"], "datasets": stats["fingerprint"]})
    return "\n".join(lines)


def _consensus(judges: Sequence[str]) -> str:
    return f"Preference data by consensus of {len(judges)} LLM judges ({', '.join(judges)})"


def _size_category(rows: int) -> str:
    """The Hub's size category for a number of rows."""
    bounds = [("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7)]
    return next((name for name, bound in bounds if rows < bound), "10M<n<100M")
