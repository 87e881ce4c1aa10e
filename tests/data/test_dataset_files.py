"""The written datasets: files, card, statistics, and the libraries that read them."""

import copy
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ray_pipeline.config.loading import read_config
from ray_pipeline.data import spill
from ray_pipeline.data.card import Provenance, pipeline_text
from ray_pipeline.data.dataset_files import of_prompts, write_dataset_files
from ray_pipeline.data.dataset_rows import DatasetsConfig, kto_rows
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.data.rows import KeyMismatch, add_counts
from ray_pipeline.store.files import FINGERPRINT_KEY, Folder
from ray_pipeline.store.schemas import DPO, KTO, to_table
from ray_pipeline.training.methods import METHODS
from ray_pipeline.workflow.registry import find_workflow
from tests.golden.test_goldens import SHIPPED
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
    assert stats["gate"] == GateConfig().decides_by()
    assert (stats["judges"], stats["lineage"], stats["fingerprint"]) == (JUDGES, {"gate": "f1"}, "f2")


def test_a_limit_on_prompts_keeps_whole_prompts_of_the_training_split(tmp_path):
    world = random_world(80, seed=3)
    for name, most in (("all", None), ("capped", 10)):
        write_run(tmp_path / name, world, max_prompts=most)
    whole, capped = (tmp_path / name / "datasets" for name in ("all", "capped"))

    def rows(folder, kind, split):
        return pa.concat_tables([pq.read_table(f) for f in sorted((folder / kind / split).iterdir())]).to_pylist()

    for kind in ("kto", "dpo"):
        kept, all_rows = rows(capped, kind, "train"), rows(whole, kind, "train")
        prompts = {row["prompt_id"] for row in kept}
        assert len(prompts) == 10 < len({row["prompt_id"] for row in all_rows})
        assert len(kept) == sum(row["prompt_id"] in prompts for row in all_rows)
        assert rows(capped, kind, "val") == rows(whole, kind, "val")
    stats = json.loads((capped / "stats.json").read_text())
    assert stats["settings"]["max_prompts"] == 10 and stats["rows"]["kto"]["train"] == len(rows(capped, "kto", "train"))
    table = to_table(rows(whole, "kto", "train"), KTO)
    assert of_prompts(table, 10**6) == table and of_prompts(table, 5).num_rows < of_prompts(table, 6).num_rows


def test_rows_are_drawn_to_the_smallest_size_for_each_class_and_seed(tmp_path):
    world = random_world(80, seed=3)
    write_run(tmp_path / "whole", world)
    stats = json.loads((tmp_path / "whole" / "datasets" / "stats.json").read_text())
    sizes = [
        {"kto": {"train_desirable": 9, "train_undesirable": 10**6}, "dpo": {"train": 7}, "sft": {"train": 7}},
        {"kto": {"train_desirable": 5, "train_undesirable": 4}, "dpo": {"train": 10**6}, "sft": {"train": 7}},
    ]

    def drawn_ids(name, seed, kind, split="train"):
        config = DatasetsConfig(max_length=60, max_prompt_length=20, seed=seed)
        if not (tmp_path / name).exists():
            write_run(tmp_path / name, world, config=config, sizes=sizes)
        files = sorted((tmp_path / name / "datasets" / kind / split).iterdir())
        return pa.concat_tables([pq.read_table(f) for f in files]).to_pylist()

    first, again, other = (drawn_ids(name, seed, "kto") for name, seed in (("x", 1), ("y", 1), ("z", 2)))
    for rows in (first, other):
        assert sorted(row["label"] for row in rows) == [False] * 4 + [True] * 5
    assert first == again
    assert {row["candidate_id"] for row in first} != {row["candidate_id"] for row in other}
    assert len(drawn_ids("x", 1, "dpo")) == 7
    assert len(drawn_ids("x", 1, "kto", "val")) == stats["rows"]["kto"]["val"] > 0
    written = json.loads((tmp_path / "x" / "datasets" / "stats.json").read_text())
    assert written["rows"]["kto"]["train"] == 9 and written["settings"]["kto_train_undesirable_at_most"] == 4
    assert "kto_train_desirable_at_most" not in stats["settings"]
    assert "| dpo_train_at_most | 7 |" in (tmp_path / "x" / "datasets" / "README.md").read_text()


def test_what_is_held_in_memory_does_not_change_the_files(written, tmp_path, monkeypatch):
    folder, _, run = written
    monkeypatch.setattr(spill, "HELD", 0)
    write_run(tmp_path / "parts", random_world(60, seed=8), config=run.config, num_shards=8)
    for file in sorted(folder.rglob("*.parquet")):
        assert (tmp_path / "parts" / "datasets" / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_card(written):
    folder, stats, _ = written
    text = (folder / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    card = yaml.safe_load(front)
    assert card["size_categories"] == ["n<1K"] and card["license"] == "other"
    assert {"kto", "dpo", "synthetic"} <= set(card["tags"])
    for config, kind in zip(card["configs"], ("kto", "dpo"), strict=True):
        assert config["config_name"] == kind and "f2" in config["description"]  # `datasets` caches by both
        paths = [(f["split"], f["path"]) for f in config["data_files"]]
        assert paths == [("train", f"{kind}/train/*.parquet"), ("validation", f"{kind}/val/*.parquet")]
    for word in ("| tau | 2.5 |", "helpfulness, factuality, conciseness", "prompt_too_long", "| gate | f1 |", "f2"):
        assert word in body, word
    for column in (*KTO.names, *DPO.names):
        assert column in body, column
    assert str(stats["kto_weights"]["undesirable_weight"]) in body
    first = pq.read_table(folder / "kto" / "train" / "part-00000.parquet").slice(0, 1).to_pylist()[0]
    assert json.dumps(first, indent=2, ensure_ascii=False) in body  # a sample row
    assert "@software{quorum_align" in body
    assert not (folder / "pipeline.yaml").exists()  # this writer was given no configuration


def card_of(tmp_path, config, **more):
    """Card and pipeline.yaml of a tiny dataset with a configuration."""
    world = make_world({"q": [("a", (9, 9, 9), False), ("b", (1, 1, 1), False)]})
    write_run(tmp_path, world, num_shards=1, origin=Provenance(config=config, given=config, **more))
    return (tmp_path / "datasets" / "README.md").read_text(), (tmp_path / "datasets" / "pipeline.yaml").read_text()


def test_the_card_names_what_the_configuration_knows_and_says_what_it_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "a-secret-value")
    config = {
        "run": {"name": "r", "root": "/home/me/runs"},
        "models": {
            "policy": {"engine": "vllm", "model": "/home/me/models/small", "revision": None},
            "judge": {"engine": "openai", "model": "big", "endpoint": {"base_url": "http://a/v1?x=a-secret-value"}},
        },
        "prompt_templates": "default",
        "prompts": {
            "sources": [
                {"type": "huggingface", "name": "some/prompts", "license": "cc-by-4.0"},
                {"type": "jsonl", "path": "/home/me/prompts.jsonl", "license": None},
            ]
        },
        "candidates": {"model": "policy", "k": 2, "sampling": {"temperature": 0.8}},
        "judge": {
            "model": "judge",
            "rubrics": [{"name": "tone", "text": "Is it kind?"}, {"name": "facts", "text": ""}],
        },
        "critic": {"model": "judge"},
    }
    card, pipeline = card_of(tmp_path, config)
    for line in (
        "| candidates.model | small |", "| judge.model | big (behind an endpoint) |", "| candidates.k | 2 |",
        "| candidates.sampling.temperature | 0.8 |", "| tone, 1 to 10 | Is it kind? |",
        "| facts, 1 to 10 | text of the templates default |",
        "| 1. huggingface | name some/prompts; licence: cc-by-4.0 |",
        "| 2. jsonl | path prompts.jsonl; licence: unknown |",
    ):  # fmt: skip
        assert line in card, line
    assert "/home/me" not in card + pipeline and "a-secret-value" not in card + pipeline
    read = yaml.safe_load(pipeline)
    assert read["candidates"] == config["candidates"] and read["models"]["policy"]["model"] == "small"
    assert "run" not in read


def test_the_card_of_imported_rows_does_not_call_them_synthetic(tmp_path):
    source = {"type": "huggingface", "name": "some/pairs", "split": "train", "format": "paired", "license": "mit"}
    card, _ = card_of(tmp_path, {"prompts": {"sources": [{"type": "text"}]}}, imported=source, license="mit")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "mit" and "synthetic" not in front["tags"] and "synthetic" not in card
    assert "| huggingface | name some/pairs, split train, format paired; licence: mit |" in card
    assert "## Prompt sources" not in card and "## Generators" not in card


@pytest.mark.parametrize("name", ["pocket", "pocket_fellowship", "pocket_baselines"])
def test_pipeline_yaml_is_a_configuration(name):
    workflow = find_workflow(SHIPPED[name])
    with open(f"configs/{name}.yaml") as file:
        config = read_config(workflow.config, yaml.safe_load(file), [])
    again = read_config(workflow.config, yaml.safe_load(pipeline_text(Provenance.of(config).given)), [])
    assert again.model_copy(update={"run": config.run, "ray": config.ray}) == config


def test_datasets_library_reads_it(written, load):
    folder, stats, _ = written
    for kind in ("kto", "dpo"):
        whole = load(str(folder / kind))
        assert {k: list(v) for k, v in load(str(folder), kind).items()} == {k: list(v) for k, v in whole.items()}
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
    for kind in ("kto", "dpo"):  # the whole folder, as it lies
        assert len(pandas.read_parquet(folder / kind)) == stats["rows"][kind]["train"] + stats["rows"][kind]["val"]


def test_duckdb_reads_it(written):
    duckdb = pytest.importorskip("duckdb")
    folder, stats, _ = written
    ((rows,),) = duckdb.sql(f"select count(*) from '{folder}/kto/*/*.parquet'").fetchall()
    assert rows == stats["rows"]["kto"]["train"] + stats["rows"]["kto"]["val"]


def test_datasets_of_two_runs_with_one_folder_name_are_not_confused(tmp_path, load):
    """`datasets` caches a local folder under its last name and what its card says."""
    found = []
    for run, text in (("one", "a"), ("two", "b")):
        write_run(tmp_path / run, make_world({"q": [(text, (9, 9, 9), False)]}), num_shards=1, fingerprint=run)
        found.append(load(str(tmp_path / run / "datasets"), "kto")["train"][0]["completion"][0]["content"])
    assert found == ["a", "b"]


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
    assert {split: len(data) for split, data in load(str(folder), "kto").items()} == {"train": 1}
    assert "config_name: dpo" not in (folder / "README.md").read_text()


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


@pytest.mark.parametrize("name", ["kto", "dpo", "sft", "orpo", "simpo"])
def test_trl_takes_it_as_it_is(tmp_path, load, tokenizer, name, caplog):
    """TRL's own preparation keeps every row in our order, beside the columns that it does not read, does not warn about
    the class weights, and trains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    method = METHODS[name]
    config = DatasetsConfig(max_length=60, max_prompt_length=20, kinds=["kto", "dpo", "sft"])
    write_run(tmp_path, random_world(40, seed=8), config=config)
    folder = tmp_path / "datasets"
    stats = json.loads((folder / "stats.json").read_text())
    data = load(str(folder / method.data))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=256,
        )
    )  # fmt: skip
    shared = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    shared |= {"per_device_train_batch_size": 4, "max_length": 200, "save_strategy": "no", **method.settings}
    reference = {"ref_model": copy.deepcopy(model)} if name in ("kto", "dpo") else {}
    logging.getLogger("trl").propagate = True
    with caplog.at_level(logging.WARNING):
        trainer = method.trainer_class()(
            model,
            args=method.config_class()(**shared, **(stats["kto_weights"] if name == "kto" else {})),
            train_dataset=data["train"],
            processing_class=tokenizer,
            **reference,
        )
    key = "chosen_id" if method.data == "dpo" else "candidate_id"
    assert list(trainer.train_dataset[key]) == list(data["train"][key])
    assert "ideal range" not in caplog.text
    assert trainer.train().global_step == 1
