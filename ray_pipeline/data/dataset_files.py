"""Training files: kept rows of all shards in training order, in numbered files with a card and `stats.json`.

TRL feeds KTO rows in the order of the file, so the order is made here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.data.card import Provenance, write_card
from ray_pipeline.data.confidence import row_weights
from ray_pipeline.data.dataset_rows import RULES, SPLITS, DatasetsConfig, Kind
from ray_pipeline.data.gate import Floats, GateConfig
from ray_pipeline.data.rows import Rows, gather, one_array, refuse_repeats
from ray_pipeline.data.spill import Spill
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import unit_hash
from ray_pipeline.store.schemas import TABLES, WEIGHT

#: Key columns of each kind of row.
_KEYS: dict[Kind, tuple[str, ...]] = {
    "kto": ("candidate_id",),
    "dpo": ("prompt_id", "chosen_id", "rejected_id"),
    "sft": ("candidate_id",),
}
#: Label of a row, None where rows have none → the count of such training rows.
_CLASSES = {True: "train_desirable", False: "train_undesirable", None: "train"}
#: Number of a row among those of all tables.
_ROW = "row"

Keep = Literal["random", "margin", "confidence"]
"""Which prompts are kept of too many: those of the smallest hash, the largest gap of final scores, or the rows of which
the judges are surest."""


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
    [1, 1.33], its bounds rounded to two digits. (1, 1) where that holds already; else the class that weighs too little
    gets the smallest weight of two digits that brings the ratio inside, so that one row more or less never changes a
    weight by more than its share and 0.01.
    """
    if n_desirable < 1 or n_undesirable < 1:
        return None
    if n_desirable < n_undesirable:
        return _above(100 * n_undesirable, n_desirable), 1.0
    if 100 * n_desirable > 133 * n_undesirable:
        return 1.0, _above(10_000 * n_desirable, 133 * n_undesirable)
    return 1.0, 1.0


def _above(numerator: int, denominator: int) -> float:
    """The next hundredth above a ratio in hundredths."""
    return (numerator // denominator + 1) / 100


def of_prompts(table: pa.Table, most: int, keep: Keep = "random") -> pa.Table:
    """The rows with at most `most` prompts in the training split, of equal ones those of the smallest hash. The
    validation split is kept whole.

    Args:
        keep: the order of prompts. For `margin` a prompt has the largest `score_gap` of its pairs, or the range of
            `final_score` of its other rows; for `confidence` the smallest `weight` of its rows.
    """
    split, prompts = one_array(table["split"]).to_pylist(), one_array(table["prompt_id"]).to_pylist()
    trained = {prompt for prompt, part in zip(prompts, split, strict=True) if part == "train"}
    worth = _worth(table, keep)
    order = sorted(trained, key=lambda prompt: (-worth.get(prompt, 0.0), unit_hash("max_prompts", prompt), prompt))
    kept = set(order[:most])
    return table.filter(
        pa.array([part != "train" or prompt in kept for prompt, part in zip(prompts, split, strict=True)], pa.bool_())
    )


def _worth(table: pa.Table, keep: Keep) -> dict[str, float]:
    """By prompt; those of the largest worth are kept."""
    if keep == "random":
        return {}
    name = "weight" if keep == "confidence" else "score_gap" if "score_gap" in table.column_names else "final_score"
    found = table.group_by("prompt_id").aggregate([(name, "min"), (name, "max")])
    least, most = found[f"{name}_min"], found[f"{name}_max"]
    worth = {"weight": least, "score_gap": most, "final_score": pc.subtract(most, least)}[name]
    return dict(zip(found["prompt_id"].to_pylist(), pc.fill_null(worth, 0.0).to_pylist(), strict=True))


def drawn(table: pa.Table, kind: Kind, most: Mapping[str, int], seed: int) -> pa.Table:
    """The rows with at most so many in the training split, drawn by a seeded hash of their ids. The validation split is
    kept whole.

    Args:
        most: as the counts of rows in `stats.json`: `train_desirable` and `train_undesirable` for KTO, else `train`.
    """
    split = one_array(table["split"]).to_pylist()
    labels = one_array(table["label"]).to_pylist() if kind == "kto" else [None] * len(split)
    ids = zip(*(table[name].to_pylist() for name in _KEYS[kind]), strict=True)
    of_class: dict[bool | None, list[tuple[float, int]]] = {}
    for row, (part, label, key) in enumerate(zip(split, labels, ids, strict=True)):
        if part == "train":
            of_class.setdefault(label, []).append((unit_hash("drawn", seed, *key), row))
    left_out = {row for label, rows in of_class.items() for _, row in sorted(rows)[most[_CLASSES[label]] :]}
    return table.filter(pa.array([row not in left_out for row in range(len(split))], pa.bool_()))


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
    origin: Provenance | None = None,
    lengths: str | None = None,
    max_prompts: int | None = None,
    keep: Keep = "random",
    confidence: Iterable[pa.Table] | None = None,
    sizes: Sequence[Mapping[str, Mapping[str, int]]] = (),
    contamination: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write `<folder>/<kind>/{train,val}/part-00000.parquet …`, the card (README.md), and stats.json last.

    Args:
        tables: kind → tables of the shards, in any order. In memory are one table, one file and all ids.
        fingerprint: of the stage; goes into the footer of every file.
        counts: kind → sum of the shards' counts (`rows.add_counts`).
        gate: thresholds that made the labels, for the card; None where no gate did.
        lineage: stage → fingerprint of what the rows were made from, for the card.
        origin: where the preferences come from, for the card; default: the consensus of the judges.
        lengths: how tokens were counted, for the card (`tokens.counted_with`).
        max_prompts: largest number of prompts in each training split; default: all.
        keep: which prompts these are; `confidence` needs the argument of this name.
        confidence: tables of schema CONFIDENCE of the candidates of all rows; kto and dpo rows then have weights.
        sizes: `rows` of the `stats.json` of datasets, to the smallest of which this one is cut at random.

    Returns:
        Content of stats.json: `rows` (kind → rows of each split, for KTO of each class too), `counts`,
        `kto_weights` ({desirable_weight, undesirable_weight}, of the train split; None if a class is empty),
        `gate`, `judges`, `lineage`, `settings`, `origin`, `rules` (`dataset_rows.RULES`), `fingerprint` and, if known,
        `lengths`. It contains no paths and no times.

    Raises:
        ValueError: a table does not have the schema of its kind, or a kind of `config.kinds` has no tables.
        KeyMismatch: a row occurs twice.
    """
    folder, origin = Folder(folder) if isinstance(folder, str) else folder, origin or Provenance()
    stats: dict[str, Any] = {
        "fingerprint": fingerprint,
        "rules": RULES,
        "rows": {},
        "counts": {kind: dict(counts[kind]) for kind in config.kinds},
        "kto_weights": None,
        "gate": None if gate is None else gate.decides_by(),
        "judges": list(judges),
        "lineage": dict(lineage or {}),
        "settings": _written(config, max_prompts, keep),
        "origin": origin.stored(),
    }
    desirable = None if confidence is None else {
        one: p for table in confidence
        for one, p in zip(table["candidate_id"].to_pylist(), table["desirable"].to_pylist(), strict=True)
    }  # fmt: skip
    for kind in config.kinds:
        if kind not in tables:
            raise ValueError(f"datasets.kinds contains {kind}, but there are no {kind} tables")
        most: dict[str, int] = {}
        if sizes:
            classes = [name for label, name in _CLASSES.items() if (label is None) != (kind == "kto")]
            most = {name: min(rows[kind][name] for rows in sizes) for name in classes}
            stats["settings"] |= {f"{kind}_{name}_at_most": number for name, number in most.items()}
        weigh = None if desirable is None or kind == "sft" else functools.partial(row_weights, desirable=desirable)
        rows = _write_kind(folder / kind, kind, tables[kind], config, fingerprint, max_prompts, most, keep, weigh)
        stats["rows"][kind] = rows
        if kind == "kto" and (weights := kto_weights(rows["train_desirable"], rows["train_undesirable"])):
            stats["kto_weights"] = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    if lengths:
        stats["lengths"] = lengths
    if contamination:
        stats["contamination"] = list(contamination)
    write_card(folder, stats, origin, config.kinds)
    folder.write_json("stats.json", stats)
    return stats


def _written(config: DatasetsConfig, max_prompts: int | None, keep: Keep) -> dict[str, Any]:
    """Settings for the card; those that stand for what was always so are left out."""
    written = config.model_dump(mode="json", exclude=set() if config.weights else {"weights"})
    return (
        written
        | ({} if max_prompts is None else {"max_prompts": max_prompts})
        | ({} if keep == "random" else {"keep": keep})
    )


def _write_kind(
    folder: Folder,
    kind: Kind,
    tables: Iterable[pa.Table],
    config: DatasetsConfig,
    fingerprint: str,
    max_prompts: int | None,
    most: Mapping[str, int],
    keep: Keep = "random",
    weigh: Callable[[pa.Table], Floats] | None = None,
) -> dict[str, int]:
    """Numbered files of each split in training order; returns their numbers of rows, for KTO of each class too.

    The order needs all ids, the rows are put apart by file on disk. A split without rows still gets one file, so that
    readers find its columns.
    """
    schema, rows = TABLES[kind], dict[str, int]()
    with Spill(schema) as arrived, Spill(schema) as filed:
        ids, sizes = _arrive(kind, tables, arrived)
        if weigh is not None:
            ids = ids.append_column(WEIGHT, pa.array(weigh(ids)))
        if max_prompts is not None:
            ids = of_prompts(ids, max_prompts, keep)
        if most:
            ids = drawn(ids, kind, most, config.seed)
        files: list[tuple[Folder, str, Rows]] = []
        for split in SPLITS:
            own = ids.filter(pc.equal(ids["split"], split))
            order = np.asarray(own[_ROW])[training_order(own, kind, config.seed)]
            for number, start in enumerate(range(0, max(len(order), 1), config.rows_per_file)):
                name = f"part-{number:05d}.parquet"
                files.append((folder / split, name, order[start : start + config.rows_per_file]))
            rows[split] = len(order)
            if kind == "kto":
                rows[f"{split}_desirable"] = pc.sum(own["label"]).as_py() or 0
                rows[f"{split}_undesirable"] = rows[split] - rows[f"{split}_desirable"]
        file_of = np.full(sum(sizes), -1, dtype=np.int64)
        for number, (_, _, places) in enumerate(files):
            file_of[places] = number
        for number, goes in enumerate(np.split(file_of, np.cumsum(sizes))[:-1]):
            kept = np.flatnonzero(goes >= 0)
            filed.add_table(gather(arrived.read(number), kept), goes[kept])
        for number, (place, name, places) in enumerate(files):
            order = np.searchsorted(np.sort(places), places)
            part = gather(filed.read(number), order).combine_chunks()
            if weigh is not None:
                part = part.append_column(WEIGHT, pa.array(weigh(part)))
            place.write_table(name, part, fingerprint=fingerprint, kind=kind)
    written = {(place.location, name) for place, name, _ in files}
    for place in (folder / split for split in SPLITS):
        for name in place.names(".parquet"):
            if (place.location, name) not in written:  # of an earlier attempt; a loader would read it
                place.delete(name)
    return rows


def _arrive(kind: Kind, tables: Iterable[pa.Table], spill: Spill) -> tuple[pa.Table, list[int]]:
    """Put the tables on disk by number. Returns what decides the order, with the row numbers, and the tables' sizes."""
    schema = TABLES[kind]
    deciding_too = {"kto": ["label", "final_score"], "dpo": ["score_gap"], "sft": list[str]()}[kind]
    names = list(dict.fromkeys([*_KEYS[kind], "prompt_id", "split", *deciding_too]))
    deciding, sizes = [schema.empty_table().select(names)], list[int]()
    for number, table in enumerate(tables):
        if not table.schema.equals(schema):
            raise ValueError(f"a {kind} table must have the schema\n{schema}\nnot\n{table.schema}")
        deciding.append(table.select(names))
        sizes.append(table.num_rows)
        spill.add_table(table, np.full(table.num_rows, number, dtype=np.int64))
    ids = pa.concat_tables(deciding).combine_chunks()
    if kind == "dpo":
        pairs = pc.binary_join_element_wise(one_array(ids["chosen_id"]), one_array(ids["rejected_id"]), " over ")
        refuse_repeats(pairs, "dpo: pair")
    else:
        refuse_repeats(one_array(ids["candidate_id"]), f"{kind}: candidate_id")
    return ids.append_column(_ROW, pa.array(np.arange(ids.num_rows, dtype=np.int64))), sizes
