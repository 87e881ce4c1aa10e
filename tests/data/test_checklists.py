"""Checklists in a run: written once for each prompt, edited, ticked, audited, and reported."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest

from dags.dmapo import dmapo
from ray_pipeline.audit.findings import RunTables
from ray_pipeline.audit.rows import audit_run
from ray_pipeline.config.loading import read_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.data.checklist_stats import checklist_stats
from ray_pipeline.data.page import checklists_section
from ray_pipeline.data.sources.source import InputError
from ray_pipeline.graph.results import table_of
from ray_pipeline.graph.stage import BadInput, Dag, Stage, StageResult
from ray_pipeline.operate.estimate import estimate
from ray_pipeline.store.schemas import VERDICTS, to_table
from ray_pipeline.workflow import training
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.dags.test_fellowship_stages import SHARDS, play
from tests.scripted import ScriptedEngine

PROMPTS = 12
GIVEN = ["Has no comma.", {"text": "Is polite.", "weight": 3}]


@pytest.fixture(autouse=True)
def _without_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)


def config_of(*rubrics: dict[str, Any], **more: Any) -> DmapoConfig:
    values = {
        "run": {"name": "ticked"},
        "models": {name: {"model": f"pocket:{name}"} for name in ("policy", "judge")},
        "prompts": {"sources": [{"type": "constrained", "count": PROMPTS}], "num_shards": SHARDS},
        "candidates": {"k": 2},
        "judge": {"rubrics": list(rubrics), "layout": "shared_first"},
        "critic": None,
        "gate": {"use_variance": False},
        "train": None,
        **more,
    }
    if values["train"] is None:
        values["tokenizer"] = "pocket:policy"
    return read_config(DmapoConfig, values)


def replies(messages: Any, sampling: Any) -> str:
    """The policy writes a comma into some answers, the writer three items; the judge finds the comma."""
    text = messages[-1]["content"]
    if sampling.grammar is None:
        return "One, two." if sampling.seed % 2 else "One and two."
    fields = sampling.grammar.decoded()["properties"]
    if "items" in fields:
        return json.dumps({"items": ["Has no comma.", "Is a text.", "Is a poem."]})
    if "score" in fields:
        return '{"reason": "", "score": 5}'
    told = {"comma": "One, two." not in text, "text": True, "poem": False, "polite": True}
    items = text.split("<list ")[1].split(">\n", 1)[1].split("\n</list")[0].split("\n")
    ticks: dict[str, Any] = {}
    for number, item in enumerate(items, 1):
        met = next(value for word, value in told.items() if word in item)
        ticks |= {f"evidence_{number}": "words", f"met_{number}": met}
    return json.dumps(ticks)


def made(config: DmapoConfig, root: Path, *engines: ScriptedEngine) -> tuple[Dag, dict[str, StageResult]]:
    dag = Dag("dmapo", dmapo(config, str(root)).upto("datasets"))
    engine = engines[0] if engines else ScriptedEngine(replies)
    return dag, play(dag, root, lambda stage: engine)


WRITTEN = {"name": "written", "checklist": {"model": "judge"}}
#: 1 of 3 items is met by every candidate, 1 by none.
SHARES = {"One, two.": 1 / 3, "One and two.": 2 / 3}


def rows_of(results: dict[str, StageResult], stage: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = results[stage].table().read_all().to_pylist()
    return rows


def test_one_list_a_prompt_and_one_reply_a_candidate(tmp_path: Path) -> None:
    engine = ScriptedEngine(replies)
    config = config_of(WRITTEN, {"name": "given", "items": GIVEN}, {"name": "plain", "text": "kind?"})
    dag, results = made(config, tmp_path, engine)
    kinds = collections.Counter(
        next(iter(s.grammar.decoded()["properties"])) if s.grammar else "" for _, s in engine.asked
    )
    texts = {row["candidate_id"]: row["response"] for row in rows_of(results, "candidates")}
    distinct = len({(row["prompt_id"], row["response"]) for row in rows_of(results, "candidates")})
    judged = {row["prompt_id"] for row in rows_of(results, "candidates")}
    assert kinds == {"": 2 * len(judged), "items": len(judged), "evidence_1": 2 * distinct, "reason": distinct}

    lists = rows_of(results, "judge-checklist")
    assert {row["prompt_id"] for row in lists} == judged and {row["judge"] for row in lists} == {"written"}
    assert all(len(row["items"]) == 3 and row["items"][0] == {"text": "Has no comma.", "weight": 1.0} for row in lists)
    verdicts = {(row["candidate_id"], row["judge"]): row for row in rows_of(results, "judge")}
    assert len(verdicts) == 3 * len(texts)
    for name, text in texts.items():
        assert verdicts[name, "written"]["score"] == pytest.approx(1 + 9 * SHARES[text])
        assert verdicts[name, "given"]["score"] == (10 if text == "One and two." else pytest.approx(1 + 9 * 3 / 4))
    row = verdicts[next(name for name, text in texts.items() if "," in text), "given"]
    assert row["reason"] == "1 of 2 items are met; not met: Has no comma. (words)" and row["parse_status"] == "ok"
    assert dag.upto("checklist")[-1].name == "judge-checklist"
    for row in rows_of(results, "gate"):
        scores = [verdicts[row["candidate_id"], judge]["score"] for judge in config.judge.names]
        assert row["mean_score"] == pytest.approx(sum(scores) / 3)
    card = (Path(results["datasets"].folder) / "README.md").read_text()
    assert "checklist, written for each prompt by judge" in card and "checklist: Has no comma.; Is polite." in card


def test_edited_lists_replace_written_ones_and_only_their_prompts_are_judged_again(tmp_path: Path) -> None:
    _, first = made(config_of(WRITTEN), tmp_path)
    lists = rows_of(first, "judge-checklist")
    edited = tmp_path / "edited.jsonl"
    changed = {**lists[0], "items": [{"text": "Has no comma.", "weight": 1.0}]}
    edited.write_text("\n".join(json.dumps(row) for row in (changed, lists[1])))  # the second as it was exported

    engine = ScriptedEngine(replies)
    config = config_of({"name": "written", "checklist": {"model": "judge", "edited": str(edited)}})
    _, again = made(config, tmp_path, engine)
    assert again["judge-checklist"].fingerprint == first["judge-checklist"].fingerprint
    assert again["judge"].fingerprint != first["judge"].fingerprint
    of_prompt = [row for row in rows_of(again, "candidates") if row["prompt_id"] == lists[0]["prompt_id"]]
    assert engine.calls == len({row["response"] for row in of_prompt})
    found = {row["prompt_id"]: row for row in rows_of(again, "judge-checklist-edited")}
    row = found.pop(lists[0]["prompt_id"])
    assert (len(row["items"]), row["reason"], row["raw"]) == (1, "edited", None)
    assert found == {row["prompt_id"]: row for row in lists[1:]}
    for row in rows_of(again, "judge"):
        if row["prompt_id"] == lists[0]["prompt_id"]:
            assert row["score"] in (1.0, 10.0)

    (tmp_path / "moved").mkdir()
    moved = edited.rename(tmp_path / "moved" / "edited.jsonl")
    config = config_of({"name": "written", "checklist": {"model": "judge", "edited": str(moved)}})
    assert dmapo(config, str(tmp_path)).upto("judge")[-1].fingerprint == again["judge"].fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt_id": "p", "items": []}', r"edited\.jsonl.* line 1 has no items; write some, or remove the row"),
        ('{"prompt_id": "p", "items": ["a", ""]}', r"line 1: items\.1\.text: an item of a checklist is empty"),
        ('{"items": ["a"]}', r"line 1: prompt_id: Input should be a valid string"),
        (
            '{"prompt_id": "p", "items": ["a"]}\n{"prompt_id": "p", "items": ["b"]}',
            r"line 2: a second list of prompt p",
        ),
    ],
)
def test_a_bad_row_of_edited_lists_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "edited.jsonl"
    path.write_text(line)
    config = config_of({"name": "written", "checklist": {"model": "judge", "edited": str(path)}})
    with pytest.raises(InputError, match=message):
        dmapo(config, str(tmp_path))


def test_edited_lists_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "edited.jsonl"
    path.write_text('{"prompt_id": "00ff", "items": ["a"]}')
    with pytest.raises(BadInput, match="1 of 1 edited lists of written are of no prompt with a written one"):
        made(config_of({"name": "written", "checklist": {"model": "judge", "edited": str(path)}}), tmp_path)


def test_a_list_that_was_not_read_leaves_its_candidates_without_a_score(tmp_path: Path) -> None:
    def unread(messages: Any, sampling: Any) -> str:
        lists = sampling.grammar is not None and "items" in sampling.grammar.decoded()["properties"]
        return "no list" if lists else replies(messages, sampling)

    _, results = made(config_of(WRITTEN), tmp_path, ScriptedEngine(unread))
    assert {row["parse_status"] for row in rows_of(results, "judge-checklist")} == {"unparsed"}
    for row in rows_of(results, "judge"):
        assert (row["score"], row["parse_status"]) == (None, "unparsed")
        assert row["reason"] == "no checklist: unread: absent"
    assert {row["label"] for row in rows_of(results, "gate")} == {"incomplete"}


def test_the_audit_reads_the_ticks_again(tmp_path: Path) -> None:
    config = config_of(WRITTEN, {"name": "given", "items": GIVEN})
    _, results = made(config, tmp_path)
    run = RunTables(
        results["prompts"].table(),
        results["candidates"].table(),
        [results["judge"].table()],
        None,
        results["gate"].table(),
        results["datasets"].folder,
        config.judge.names,
        config.gate,
        config.datasets,
        ticked=config.judge.rubrics,
        checklists=[results["judge-checklist"].table()],
    )
    assert audit_run(run).ok
    table = results["judge"].table()
    shard = next(s for s in range(SHARDS) if table.read(s).num_rows)
    rows = table.read(shard).to_pylist()
    for row in rows[:2]:  # one of each judge
        row["score"] = 5.5
    table.write(shard, to_table(rows, VERDICTS))
    report = audit_run(run)
    assert report.found["checklist"] == 2
    said = [problem.message for problem in report.problems if problem.kind == "checklist"]
    assert "scores 5.5, but the ticks of its reply give" in said[0]


def test_items_that_everybody_passes_are_flagged(tmp_path: Path) -> None:
    config = config_of(WRITTEN, {"name": "given", "items": GIVEN})
    _, results = made(config, tmp_path)
    verdicts, written = table_of(results, "verdicts"), table_of(results, "checklists")
    assert verdicts is not None
    given, of_prompts = checklist_stats(verdicts, {"given": ["Has no comma.", "Is polite."]}, written)
    judged = {row["prompt_id"] for row in rows_of(results, "candidates")}
    assert given.judge == "given" and given.items == 2 and given.always == 1
    assert [(item.text, item.met == item.ticked) for item in given.shown] == [
        ("Has no comma.", False),
        ("Is polite.", True),
    ]
    assert of_prompts.items == 3 * len(judged) and of_prompts.always >= len(judged) <= of_prompts.never
    assert any(item.text == "Is a text." for item in of_prompts.shown)
    section = checklists_section([given, of_prompts])
    assert section is not None and "met by every candidate" in str(section) and checklists_section([]) is None


def test_a_plan_counts_the_calls_of_checklists(tmp_path: Path) -> None:
    config = config_of(WRITTEN, {"name": "given", "items": GIVEN})
    dag = Dag("dmapo", dmapo(config, str(tmp_path)).upto("judge"))

    def count(stage: Stage) -> Any:
        return lambda messages: sum(len(message["content"]) // 4 for message in messages)

    planned = estimate(dag, count, lambda stage: None).stages
    prompts = len(rows_of(made(config, tmp_path)[1], "judge-checklist"))
    assert planned["judge-checklist"].calls == prompts and planned["judge"].calls == 4 * prompts


def test_a_writer_is_a_key_of_models() -> None:
    with pytest.raises(
        ConfigError, match=r"judge\.rubrics\.written\.checklist\.model is 'judgd', which is not defined"
    ):
        config_of({"name": "written", "checklist": {"model": "judgd"}}, {"name": "a", "text": "b"})
