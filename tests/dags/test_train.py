"""`quorum run train`: a user's pairs, labelled answers or demonstrations go straight to training files and held-out
prompts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dags.train import TrainConfig, train
from ray_pipeline.audit.findings import AuditReport
from ray_pipeline.audit.imported import audit_imported
from ray_pipeline.config.loading import load_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.sources import InputError
from ray_pipeline.data.tokens import token_counter
from ray_pipeline.graph.stage import BadInput, Dag, StageResult, StageStop
from ray_pipeline.operate.check import findings
from ray_pipeline.operate.pending import Pending
from ray_pipeline.operate.run_settings import run_settings
from ray_pipeline.pocket.tasks import is_correct, make_prompts, truth
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id
from ray_pipeline.store.schemas import TABLES, to_table
from ray_pipeline.workflow import training
from ray_pipeline.workflow.registry import find_workflow, workflow_names
from tests.dags.test_fellowship_stages import SHARDS, play
from tests.scripted import ScriptedEngine

ASKED = [prompt.instruction for prompt in make_prompts(60, seed=3)]
PAIRS = [{"prompt": text, "chosen": truth(text), "rejected": "sorry i can not"} for text in ASKED]
LABELLED = [
    {"prompt": text, "completion": answer, "label": label}
    for text in ASKED
    for answer, label in ((truth(text), True), ("sorry i can not", False))
]
SHOWN = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": truth(text)}]} for text in ASKED
]


@pytest.fixture(autouse=True)
def _no_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL takes many seconds to import, and its names are tested beside its trainers."""
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, *overrides: str, **keys: Any) -> TrainConfig:
    """The shipped file on the pocket models and a file of rows."""
    source = {"type": path.suffix[1:], "path": str(path), **keys}
    small = "dtype: float32, max_model_len: 256"
    return load_config(
        TrainConfig,
        "train",
        [
            f"preferences={json.dumps(source)}",
            f"models={{policy: {{model: 'pocket:policy', {small}}}, judge: {{model: 'pocket:judge', {small}}}}}",
            f"prompts={{val_fraction: 0.3, num_shards: {SHARDS}}}",
            "datasets={max_length: 128, max_prompt_length: 64}",
            *overrides,
        ],
    )


def files(stage: StageResult, kind: str, split: str) -> list[dict[str, Any]]:
    folder = Path(Folder(stage.folder).path()) / kind / split
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def played(config: TrainConfig, root: Path) -> dict[str, StageResult]:
    """Rows, held-out prompts and files."""
    whole = train(config, str(root))
    dag = Dag("train", [s for s in whole.stages if s.name in ("rows", "prompts", "datasets")])
    return play(dag, root, lambda stage: ScriptedEngine(lambda messages, sampling: ""))


@pytest.mark.parametrize(
    ("name", "rows", "form", "method", "counts"),
    [
        ("a.jsonl", PAIRS, "paired", "dpo", {"dpo": 60, "kto": 120, "sft": 60}),
        ("a.csv", PAIRS, "paired", "dpo", {"dpo": 60, "kto": 120, "sft": 60}),
        ("a.parquet", LABELLED, "unpaired", "kto", {"kto": 120, "sft": 60}),
        ("a.jsonl", SHOWN, "demonstrations", "sft", {"sft": 60}),
    ],
)
def test_rows_of_every_format(
    name: str, rows: Any, form: str, method: str, counts: dict[str, int], tmp_path: Path
) -> None:
    override = f"train={{method: {method}}}"
    config = load(written(tmp_path / name, rows), override, format=form)
    assert set(config.datasets.kinds) == set(counts) and config.evaluate.perplexity == ("kto" in counts)
    found = played(config, tmp_path / "run")
    prompts = found["prompts"].table().read_all().to_pylist()
    assert {row["prompt_id"] for row in prompts} == {prompt_id([{"role": "user", "content": t}]) for t in ASKED}
    held_out = {row["prompt_id"] for row in prompts if row["split"] == "val"}
    assert 5 < len(held_out) < 30 and found["prompts"].facts["counts"]["val"] == len(held_out)
    for kind, count in counts.items():
        parts = {split: files(found["datasets"], kind, split) for split in ("train", "val")}
        assert sum(map(len, parts.values())) == count
        assert not {row["prompt_id"] for row in parts["train"]} & held_out
        assert {row["prompt_id"] for row in parts["val"]} == held_out
    card = (Path(Folder(found["datasets"].folder).path()) / "README.md").read_text()
    assert f"{form} rows of" in card and name in card and "synthetic" not in card and "UltraFeedback" not in card


def test_every_row_is_found_again_in_the_users_file(tmp_path: Path) -> None:
    thinking = {**PAIRS[0], "chosen": f"<think>so</think>{PAIRS[0]['chosen']} ."}
    cut = [{"role": "assistant", "content": PAIRS[1]["chosen"], "finish_reason": "length"}]
    path = written(tmp_path / "a.jsonl", [*PAIRS, thinking, {**PAIRS[1], "chosen": cut}])
    config = load(path)
    found = played(config, tmp_path / "run")

    def audited() -> AuditReport:
        return audit_imported(
            config.preferences,
            found["datasets"].folder,
            config.datasets,
            config.prompts.seed,
            config.prompts.val_fraction,
            found["rows"].facts["digests"],
        )

    report = audited()
    assert report.ok and report.rows["dpo"] == 61 and report.rows["prompts"] == 60
    assert "121 KTO and 61 DPO and 61 SFT rows walked back to 60 prompts, compared with 62 rows" in report.summary()
    # One answer is exchanged, one row is in the wrong class, one row is lost.
    folder = Folder(found["datasets"].folder)
    for kind, change in (
        ("dpo", lambda rows: [{**rows[0], "chosen": rows[0]["rejected"]}, *rows[1:]]),
        ("kto", lambda rows: [{**rows[0], "label": not rows[0]["label"]}, *rows[1:]]),
        ("sft", lambda rows: rows[1:]),
    ):
        part = folder / kind / "train"
        rows = part.read_table("part-00000.parquet").to_pylist()
        fingerprint = folder.read_json("stats.json")["fingerprint"]
        table = to_table(change(rows), TABLES[kind])
        part.write_table("part-00000.parquet", table, fingerprint=fingerprint, kind=kind)
    assert audited().found == {"orphan": 2, "count": 1}
    path.write_text(path.read_text() + "\n" + json.dumps(PAIRS[1]))
    with pytest.raises(InputError, match="has changed since the run read it"):
        audited()


@pytest.mark.parametrize(
    ("form", "rows"), [("paired", PAIRS), ("unpaired", LABELLED), ("demonstrations", SHOWN)], ids=lambda value: value[0]
)
def test_equal_rows_are_one_row_with_their_number(form: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """K5.4"""
    kinds = {"paired": ("dpo", "kto", "sft"), "unpaired": ("kto", "sft"), "demonstrations": ("sft",)}[form]
    again = [*rows, *rows[:4], *rows[:2]]
    config = load(written(tmp_path / "a.jsonl", again), f"train={{method: {kinds[0]}}}", format=form)
    found = played(config, tmp_path / "run")["datasets"]
    for kind in kinds:
        copies = [row["copies"] for split in ("train", "val") for row in files(found, kind, split)]
        assert set(copies) == {1, 2, 3}
    card = (Path(Folder(found.folder).path()) / "README.md").read_text()
    assert "copies" in card and "dropped: repeated | 6" in card and found.facts["dropped"][f"{kinds[0]}: repeated"] == 6

    def audited() -> AuditReport:
        return audit_imported(
            config.preferences,
            found.folder,
            config.datasets,
            config.prompts.seed,
            config.prompts.val_fraction,
            encode=token_counter(config.base.tokenizer),
        )

    assert audited().ok
    folder = Folder(found.folder)
    for kind in kinds:
        part = folder / kind / "train"
        lost = part.read_table("part-00000.parquet").to_pylist()
        lost[0]["copies"] += 1
        fingerprint = folder.read_json("stats.json")["fingerprint"]
        part.write_table("part-00000.parquet", to_table(lost, TABLES[kind]), fingerprint=fingerprint, kind=kind)
    assert audited().found == {"repeated": len(kinds)}


def test_the_pocket_configuration_has_rows_of_its_own(tmp_path: Path) -> None:
    assert find_workflow("train").pocket == "pocket_train"
    config = load_config(TrainConfig, "pocket_train", ["preferences.count=40"])
    found = played(config, tmp_path / "run")
    rows = [row for split in ("train", "val") for row in files(found["datasets"], "dpo", split)]
    asked = {row["prompt"][0]["content"]: row for row in rows}
    assert len(asked) == 40
    for text, row in asked.items():
        assert is_correct(text, row["chosen"][0]["content"]) and not is_correct(text, row["rejected"][0]["content"])


def test_the_method_follows_from_the_rows_where_none_is_set(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", PAIRS)
    values = {
        "preferences": {"type": "jsonl", "path": str(path)},
        "models": {"policy": {"model": "pocket:policy"}, "judge": {"model": "pocket:judge"}},
    }
    for form, method in (("paired", "dpo"), ("unpaired", "kto"), ("demonstrations", "sft")):
        values["preferences"]["format"] = form
        assert TrainConfig.model_validate(TrainConfig.resolve(values)).train.method == method
    values["train"] = {"method": "kto", "epochs": 1}
    values["preferences"]["format"] = "paired"
    assert TrainConfig.model_validate(TrainConfig.resolve(values)).train.method == "kto"


def test_one_command_from_rows_to_a_win_rate(tmp_path: Path) -> None:
    assert "train" in workflow_names() and find_workflow("train").config is TrainConfig
    config = load(written(tmp_path / "a.jsonl", PAIRS))
    dag = train(config, "/run")
    assert [stage.name for stage in dag.stages] == [
        "rows", "prompts", "datasets", "train", "responses-base", "responses-policy", "comparisons", "evaluate",
    ]  # fmt: skip
    assert dag.groups == ["datasets", "prompts", "train", "evaluate"]
    page = config.report()
    assert page.workflow == "train" and page.curating == {} and page.evaluating == {"judge": "judge"}


def test_the_checks_before_a_run(tmp_path: Path) -> None:
    config = load(written(tmp_path / "a.jsonl", PAIRS))
    dag, session = train(config, str(tmp_path)), run_settings(config, str(tmp_path)).session
    pending = Pending.of(config, dag, session, scope="offline", scratch=str(tmp_path / "scratch"))
    found = list(findings(pending))
    assert [one for one in found if one.state in ("problem", "not checked")] == []
    assert [stage.name for stage in pending.roots] == ["rows"]
    assert "60 can be read" in next(one.detail for one in found if one.what == "rows of rows")
    pending.stand_ins.make(pending.roots[0])
    assert pending.tried == ""


@pytest.mark.parametrize(
    ("override", "keys", "message"),
    [
        (
            "prompts.sources=[{type: pocket, count: 9}]",
            {},
            r"prompts: .*sources has no effect: the prompts are those of the rows",
        ),
        ("prompts.max_prompts=3", {}, r"max_prompts has no effect"),
        ("train.method=dpo", {"format": "unpaired"}, "unpaired rows cannot provide dpo data, which needs pairs"),
        ("train.method=kto", {"format": "demonstrations"}, "demonstrations rows cannot provide kto data"),
        ("datasets.kinds=[kto]", {}, "train.method is dpo, but datasets.kinds does not include dpo"),
        ("models.judge=null", {}, "models.judge"),
    ],
)
def test_a_mistake_is_told_by_its_key(override: str, keys: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path / "a.jsonl", PAIRS), override, **keys)


def test_rows_that_cannot_be_trained_on(tmp_path: Path) -> None:
    good = [row for row in LABELLED if row["label"]]
    config = load(written(tmp_path / "a.jsonl", good), "train={method: kto}", "datasets.kinds=[kto]", format="unpaired")
    with pytest.raises(StageStop, match=r"kto has no undesirable rows. Bring rows of both kinds"):
        played(config, tmp_path / "run")
    with pytest.raises(BadInput, match=r"has no column 'completion', which unpaired rows need"):
        played(load(written(tmp_path / "b.jsonl", PAIRS), "train={method: kto}", format="unpaired"), tmp_path / "other")


def test_without_held_out_prompts_the_run_says_so(tmp_path: Path) -> None:
    config = load(written(tmp_path / "a.jsonl", PAIRS), "prompts.val_fraction=0")
    found = played(config, tmp_path / "run")
    assert "no prompt is held out" in found["prompts"].facts["warnings"][0]
