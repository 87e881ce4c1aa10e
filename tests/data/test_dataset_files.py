"""The written datasets: files, card, statistics, and the libraries that read them."""

import copy
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ray_pipeline.data.dataset_files import write_dataset_files
from ray_pipeline.data.dataset_rows import DatasetsConfig, kto_rows
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.data.rows import KeyMismatch, add_counts
from ray_pipeline.store.files import FINGERPRINT_KEY, Folder
from ray_pipeline.store.schemas import DPO, KTO
from tests.planted import JUDGES, World, count_words, make_world, random_world, write_run


@pytest.fixture
def written(tmp_path):
    config = DatasetsConfig(max_length=60, max_prompt_length=20, rows_per_file=25)
    run = write_run(tmp_path, random_world(60, seed=8), config=config)
    return tmp_path / "datasets", json.loads((tmp_path / "datasets" / "stats.json").read_text()), run


@pytest.fixture
def load(tmp_path):
    """`datasets.load_dataset` with a cache of its own."""
    import datasets

    return lambda *args, **kwargs: datasets.load_dataset(*args, cache_dir=str(tmp_path / "cache"), **kwargs)


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_files_are_numbered_and_signed(written):
    folder, stats, _ = written
    parts = [f for f in files(folder) if f.startswith("kto/train/")]
    assert parts == [f"kto/train/part-{i:05d}.parquet" for i in range(-(-stats["rows"]["kto"]["train"] // 25))]
    assert len(parts) > 1
    tables = [pq.read_table(folder / f) for f in parts]
    assert [t.num_rows for t in tables[:-1]] == [25] * (len(parts) - 1)
    assert all(pq.read_schema(folder / f).metadata[FINGERPRINT_KEY] == b"f2" for f in parts)
    assert {f.split("/")[-1] for f in files(folder)} >= {"README.md", "stats.json"}


def test_the_split_is_the_prompts(written):
    folder, stats, run = written
    splits = {r["prompt_id"]: r["split"] for r in run.prompts.read_all().to_pylist()}
    for kind in ("kto", "dpo"):
        for split in ("train", "val"):
            rows = pq.read_table(folder / kind / split).to_pylist()
            assert len(rows) == stats["rows"][kind][split] > 0
            assert {splits[r["prompt_id"]] for r in rows} == {split} == {r["split"] for r in rows}


def test_training_order_has_the_class_ratio_everywhere(written):
    folder, stats, _ = written
    labels = pa.concat_tables([pq.read_table(f) for f in sorted((folder / "kto" / "train").iterdir())])["label"]
    share = stats["rows"]["kto"]["train_desirable"] / len(labels)
    windows = np.convolve(np.array(labels.to_pylist(), dtype=float), np.ones(8), mode="valid")
    assert np.abs(windows - 8 * share).max() < 1


def test_equal_rows_give_equal_bytes_in_any_order_of_shards(tmp_path):
    world = random_world(40, seed=2)
    for name, source in (("one", world), ("two", world.shuffled(4))):
        write_run(tmp_path / name, source, num_shards=2 if name == "one" else 8)
    one, two = (tmp_path / name / "datasets" for name in ("one", "two"))
    assert files(one) == files(two)
    for name in files(one):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_second_attempt_leaves_no_stale_part(tmp_path):
    small = DatasetsConfig(max_length=60, max_prompt_length=20, rows_per_file=5)
    large = small.model_copy(update={"rows_per_file": 1000})
    world = random_world(30, seed=2)
    write_run(tmp_path, world, config=small)
    write_run(tmp_path, world, config=large)
    assert [f for f in files(tmp_path / "datasets") if f.startswith("kto/train")] == ["kto/train/part-00000.parquet"]


def test_stats(written):
    _, stats, _ = written
    rows, counts = stats["rows"], stats["counts"]
    assert rows["kto"]["train"] + rows["kto"]["val"] == counts["kto"]["kept"]
    assert rows["kto"]["train_desirable"] + rows["kto"]["train_undesirable"] == rows["kto"]["train"]
    assert counts["dpo"]["prompts"] == counts["dpo"]["kept"] + sum(counts["dpo"]["dropped"].values())
    assert set(stats["kto_weights"]) == {"desirable_weight", "undesirable_weight"}
    assert stats["gate"] == GateConfig().model_dump()
    assert (stats["judges"], stats["lineage"], stats["fingerprint"]) == (JUDGES, {"gate": "f1"}, "f2")


def test_card(written):
    folder, stats, _ = written
    for kind in ("kto", "dpo"):
        text = (folder / kind / "README.md").read_text()
        front, body = text.removeprefix("---\n").split("\n---\n", 1)
        card = yaml.safe_load(front)
        assert card["size_categories"] == ["n<1K"] and kind in card["tags"] and card["license"] == "other"
        assert card["configs"][0]["config_name"] == "f2"  # `datasets` caches by this name
        paths = [(f["split"], f["path"]) for f in card["configs"][0]["data_files"]]
        assert paths == [("train", "train/*.parquet"), ("validation", "val/*.parquet")]
        for word in ("| tau | 2.5 |", "helpfulness, factuality, conciseness", "prompt_too_long", "| gate | f1 |", "f2"):
            assert word in body, word
        for column in (KTO if kind == "kto" else DPO).names:
            assert column in body, column
    assert str(stats["kto_weights"]["undesirable_weight"]) in (folder / "kto" / "README.md").read_text()


def test_datasets_library_reads_it(written, load):
    folder, stats, _ = written
    for kind in ("kto", "dpo"):
        whole = load(str(folder / kind))
        plain = load("parquet", data_files=str(folder / kind / "train" / "*.parquet"), split="train")
        assert {k: len(v) for k, v in whole.items()} == {
            "train": stats["rows"][kind]["train"], "validation": stats["rows"][kind]["val"]
        }  # fmt: skip
        stored = pa.concat_tables([pq.read_table(f) for f in sorted((folder / kind / "train").iterdir())]).to_pylist()
        assert list(plain) == stored == list(whole["train"])
        by_folder = load("parquet", data_dir=str(folder / kind / "val"), split="train")
        assert len(by_folder) == stats["rows"][kind]["val"]


def test_pandas_reads_it(written):
    pandas = pytest.importorskip("pandas")
    folder, stats, _ = written
    frame = pandas.read_parquet(folder / "kto" / "train")
    assert len(frame) == stats["rows"]["kto"]["train"] and frame["label"].dtype == bool
    assert frame["completion"][0][0]["role"] == "assistant"


def test_empty_splits(tmp_path, load):
    """They have a file with their columns; the card does not name them, since `datasets` cannot open them."""
    pandas = pytest.importorskip("pandas")
    world = make_world({"q": [("a", (9, 9, 9), False)]})
    write_run(tmp_path, world, num_shards=1)
    folder = tmp_path / "datasets"
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["kto_weights"] is None
    assert stats["rows"]["dpo"] == {"train": 0, "val": 0}
    assert pq.read_schema(folder / "dpo" / "train" / "part-00000.parquet").names == DPO.names
    found = load(str(folder / "kto"))
    assert {split: len(data) for split, data in found.items()} == {"train": 1}
    assert list(pandas.read_parquet(folder / "kto" / "val").columns) == KTO.names
    assert "configs" not in (folder / "dpo" / "README.md").read_text()


def write(tmp_path, tables, kinds, counts=None):
    return write_dataset_files(
        Folder(str(tmp_path)), tables, DatasetsConfig(kinds=kinds), fingerprint="f",
        counts=counts or {k: {"kept": 0, "dropped": {}} for k in kinds}, gate=GateConfig(), judges=JUDGES,
    )  # fmt: skip


def test_wrong_tables_are_refused(tmp_path):
    world: World = make_world({"q": [("a", (9, 9, 9), False)]})
    decisions = decide(world.candidates, world.verdicts, world.critiques, JUDGES, GateConfig())
    table, _ = kto_rows(world.prompts, world.candidates, world.verdicts, decisions, DatasetsConfig(), count_words)
    name = table["candidate_id"][0].as_py()
    with pytest.raises(KeyMismatch, match=name):
        write(tmp_path, {"kto": [table, table]}, ["kto"])
    with pytest.raises(ValueError, match="must have the schema"):
        write(tmp_path, {"kto": [table.drop_columns(["scores"])]}, ["kto"])
    with pytest.raises(ValueError, match="no dpo tables"):
        write(tmp_path, {"kto": [table]}, ["kto", "dpo"])
    assert not (tmp_path / "stats.json").exists()
    assert write(tmp_path, {"kto": iter([table])}, ["kto"])["rows"]["kto"]["train"] == 1
    assert not (tmp_path / "dpo").exists()


def test_counts_add_up():
    assert add_counts([{"a": 1, "b": {"c": 2}}, {"b": {"c": 3, "d": 1}, "a": 0}]) == {"a": 1, "b": {"c": 5, "d": 1}}
    assert add_counts([]) == {}


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kto", "dpo"])
def test_trl_takes_it_as_it_is(tmp_path, load, tokenizer, kind, caplog):
    """TRL's own preparation keeps every row in our order and does not warn about the class weights."""
    import trl
    from transformers import LlamaConfig, LlamaForCausalLM

    write_run(tmp_path, random_world(40, seed=8), config=DatasetsConfig(max_length=60, max_prompt_length=20))
    folder = tmp_path / "datasets"
    stats = json.loads((folder / "stats.json").read_text())
    data = load(str(folder / kind))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=256,
        )
    )  # fmt: skip
    shared = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    shared |= {"per_device_train_batch_size": 4, "max_length": 200}
    logging.getLogger("trl").propagate = True
    with caplog.at_level(logging.WARNING):
        if kind == "kto":
            make, config = trl.KTOTrainer, trl.KTOConfig(**shared, **stats["kto_weights"])
        else:
            make, config = trl.DPOTrainer, trl.DPOConfig(**shared)
        trainer = make(
            model,
            ref_model=copy.deepcopy(model),
            args=config,
            train_dataset=data["train"],
            processing_class=tokenizer,
        )
    key = "candidate_id" if kind == "kto" else "chosen_id"
    assert trainer.train_dataset[key] == data["train"][key]
    assert "ideal range" not in caplog.text
