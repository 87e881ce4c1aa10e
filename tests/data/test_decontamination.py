"""Decontamination: which texts overlap with benchmarks, and what becomes of prompts, answers and rows that do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_pipeline.data.candidate_sources import CandidatePrompts, FileCandidates
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.datasets import dataset_files
from ray_pipeline.data.decontamination import GRAM, Decontaminate, Overlaps, grams, words_of
from ray_pipeline.data.imported import preferences
from ray_pipeline.data.own_candidates import own_candidates
from ray_pipeline.data.page import contamination_section
from ray_pipeline.data.preference_sources import FilePreferences
from ray_pipeline.data.prompts import PromptsConfig, read_prompts
from ray_pipeline.data.prompts import prompts as prompts_stage
from ray_pipeline.data.sources import InputError
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.extensions import ExtensionError
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Stage, StageResult
from ray_pipeline.store.files import Folder
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.models import make_tokenizer

BRIDGES = "please name the seven bridges of our town and say who built each of them first"
TIDES = "explain in plain words why the sea rises and falls twice on most days of the year"


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def policy(tmp_path: Path) -> ModelSettings:
    """A model of which there is a tokenizer alone."""
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    make_tokenizer(folder)
    return ModelSettings(model=str(folder))


@pytest.fixture
def ifeval(tmp_path: Path) -> dict[str, Any]:
    """A benchmark of two questions, the second one short."""
    rows = [
        {"key": key, "prompt": text, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for key, text in enumerate([BRIDGES.capitalize() + ".", "Be brief!"])
    ]
    return {"type": "ifeval", "prompts": lines(tmp_path / "ifeval.jsonl", *rows)}


def prompts_config(tmp_path: Path, texts: list[str], against: Any, **keys: Any) -> PromptsConfig:
    source = {"type": "jsonl", "path": lines(tmp_path / "p.jsonl", *({"prompt": t} for t in texts)), "column": "prompt"}
    block = {"against": against, **{key: keys.pop(key) for key in ("action",) if key in keys}}
    return PromptsConfig.model_validate({"sources": [source], "decontaminate": block, "num_shards": 1, **keys})


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_texts_overlap_by_runs_of_words_or_where_they_are_equal() -> None:
    found = Overlaps({"a": [BRIDGES, "Be brief!"], "b": [f"Now: {BRIDGES.upper()}!"], "c": ["", "…"]})
    assert found.sizes == {"a": 2, "b": 1, "c": 2}
    assert found.of(BRIDGES) == {"a": True, "b": False}
    assert found.of(f"Well,\n{BRIDGES}?") == {"a": False, "b": False}
    words = BRIDGES.split()
    assert found.of(" ".join(words[:GRAM])) == {"a": False, "b": False}
    assert found.of(" ".join(words[: GRAM - 1])) == {}
    assert found.of("be  brief") == found.of("ＢＥ brief…") == {"a": True}
    assert found.of("be brief please") == found.of("") == found.of("?!") == {}


@given(st.lists(st.sampled_from("abc"), max_size=60), st.lists(st.sampled_from("abc"), max_size=60), st.data())
def test_texts_overlap_exactly_where_they_share_a_run(one: list[str], other: list[str], data: st.DataObject) -> None:
    runs = {tuple(one[i : i + GRAM]) for i in range(len(one) - GRAM + 1)} if len(one) >= GRAM else {tuple(one)} - {()}
    assert grams(words_of(" ".join(one))) == runs
    start, place = data.draw(st.integers(0, len(one))), data.draw(st.integers(0, len(other)))
    planted = [*other[:place], *one[start : start + data.draw(st.integers(0, GRAM + 2))], *other[place:]]
    found = Overlaps({"b": [" ".join(one)]}).of(" ".join(planted))
    assert bool(found) == bool(runs & grams(tuple(planted)))
    assert found.get("b", False) == (one == planted != [])


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_that_overlap_are_left_out_and_counted(tmp_path: Path, ifeval: dict[str, Any]) -> None:
    texts = [f"A task: {BRIDGES}", TIDES, "be brief", "be brief", "One more.", "Be brief"]
    shards: list[Any] = []
    config = prompts_config(tmp_path, texts, [ifeval, {"type": "text", "path": lines(tmp_path / "t.txt", "One more.")}])
    found = read_prompts(config, lambda _, part: shards.append(part), 1)
    assert [m[-1]["content"] for m in shards[0]["messages"].to_pylist()] == [TIDES]
    assert found.counts["dropped"] | {"contaminated": 4, "duplicate": 1} == found.counts["dropped"]
    assert found.counts["read"] == found.counts["kept"] + sum(found.counts["dropped"].values())
    facts = found.screen.facts()["contamination"]
    assert (facts["checked"], facts["overlapping"], facts["action"]) == (5, 4, "drop")
    assert facts["benchmarks"] == {
        "ifeval": {"texts": 2, "exact": 2, "overlapping": 3},
        "t.txt": {"texts": 1, "exact": 1, "overlapping": 1},
    }
    assert found.screen.warnings() == []


def test_with_warn_prompts_are_kept(tmp_path: Path, ifeval: dict[str, Any]) -> None:
    found = read_prompts(prompts_config(tmp_path, [BRIDGES, TIDES], [ifeval], action="warn"), lambda *_: None, 1)
    assert found.counts["kept"] == 2 and "contaminated" not in found.counts["dropped"]
    assert found.screen.warnings() == [
        "1 of 2 prompts overlap with ifeval (1); set prompts.decontaminate.action to drop to leave them out"
    ]


def test_caps_are_filled_with_prompts_that_are_clean(tmp_path: Path, ifeval: dict[str, Any]) -> None:
    texts = [f"{BRIDGES} {n}" for n in range(20)] + [f"number {n}" for n in range(5)]
    found = read_prompts(prompts_config(tmp_path, texts, [ifeval], max_prompts=4), lambda *_: None, 1)
    assert found.counts["kept"] == 4 and found.counts["dropped"]["over_max_prompts"] == 1


def test_where_nothing_is_left_the_run_is_refused(tmp_path: Path, ifeval: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"all prompts overlap.*prompts\.decontaminate\.action"):
        read_prompts(prompts_config(tmp_path, [BRIDGES], [ifeval]), lambda *_: None, 1)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_what_prompts_are_held_against_is_in_the_fingerprint(tmp_path: Path, ifeval: dict[str, Any]) -> None:
    config = prompts_config(tmp_path, [TIDES], [ifeval])
    stage = prompts_stage(config)
    assert pickle.loads(pickle.dumps(config)) == config == PromptsConfig.model_validate(config.model_dump(mode="json"))
    other = prompts_config(tmp_path, [TIDES], [{**ifeval, "sampling": {"max_tokens": 7}}])
    assert prompts_stage(other).fingerprint == stage.fingerprint  # how it is answered does not matter
    plain = config.model_copy(update={"decontaminate": None})
    assert "decontaminate" not in plain.model_dump(mode="json")
    assert prompts_stage(plain).fingerprint != stage.fingerprint
    rows = Path(ifeval["prompts"]).read_text()
    Path(ifeval["prompts"]).write_text(rows.replace("seven", "eight"))
    assert prompts_stage(config).fingerprint != stage.fingerprint


def test_names_are_those_of_the_benchmarks_of_the_run(policy: ModelSettings, ifeval: dict[str, Any]) -> None:
    values = {
        "run": {"name": "r"},
        "models": {"policy": {"model": policy.model}},
        "judge": {"model": "policy", "rubrics": [{"name": "helpful", "text": "Helpful?"}]},
        "critic": {"model": "policy"},
        "evaluate": {"judge": "policy"},
        "benchmarks": {"ifeval": {"prompts": ifeval["prompts"]}, "mt_bench": None},
    }

    def against(block: Any) -> Any:
        config = DmapoConfig.model_validate({**values, "prompts": {"decontaminate": block}})
        assert config.prompts.decontaminate is not None
        return config.prompts.decontaminate.model_dump(mode="json")["against"]

    assert against({}) == against({"against": ["ifeval"]}) == [ifeval]
    assert against({"against": ["mt_bench"]}) == [{"type": "mt_bench"}]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "against\n  Field required"),
        ({"against": []}, "at least 1 item"),
        ({"against": ["ifevl"]}, "unknown benchmark 'ifevl'; did you mean 'ifeval'"),
        ({"against": [{"type": "ifeval", "prompt": "x"}]}, "prompt\n  Extra inputs"),
        ({"against": [3]}, "a source is a mapping with the key type"),
    ],
)
def test_benchmarks_that_are_none_are_refused(block: Any, message: str) -> None:
    with pytest.raises((ValidationError, ExtensionError), match=message):
        PromptsConfig.model_validate({"decontaminate": block})


def test_a_benchmark_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    config = prompts_config(tmp_path, [TIDES], [{"type": "ifeval", "prompts": "none.jsonl"}])
    with pytest.raises(InputError, match=r"prompts\.decontaminate\.against: ifeval: there is no file none\.jsonl"):
        prompts_stage(config)


# --- answers and imported rows ----------------------------------------------------------------------------------------


def made(folder: Path, *stages: Stage) -> list[StageResult]:
    """The results of the stages, in order."""
    results: dict[str, StageResult] = {}
    make_here(stages, Session(str(folder), str(folder / "calls"), 2), results, print)
    return [results[stage.name] for stage in stages]


def decontaminate(*against: Any, **keys: Any) -> Decontaminate:
    return Decontaminate.model_validate({"against": list(against), **keys})


def test_answers_of_the_user_are_held_against_the_benchmarks(tmp_path: Path, ifeval: dict[str, Any]) -> None:
    rows = [
        {"prompt": TIDES, "responses": [f"You ask: {BRIDGES}", "The moon."]},
        {"prompt": "Be brief.", "responses": ["No.", "Yes."]},
    ]
    source = FileCandidates(type="jsonl", path=lines(tmp_path / "own.jsonl", *rows))
    block = decontaminate(ifeval)
    config = PromptsConfig(sources=[CandidatePrompts(source=source)], num_shards=2, decontaminate=block)
    prompts = prompts_stage(config)
    _, found = made(tmp_path, prompts, own_candidates(source, prompts, block))
    assert [row["response"] for row in found.table().read_all().to_pylist()] == ["The moon."]
    assert (
        found.facts["source"] | {"answers": 4, "kept": 1, "contaminated": 1, "of_no_prompt": 2} == found.facts["source"]
    )
    assert found.facts["contamination"]["what"] == "answers" and found.facts["contamination"]["overlapping"] == 1


def test_imported_pairs_are_held_against_the_benchmarks(
    tmp_path: Path, policy: ModelSettings, ifeval: dict[str, Any]
) -> None:
    rows = [
        {"prompt": TIDES, "chosen": f"You ask: {BRIDGES}", "rejected": "x"},
        {"prompt": TIDES, "chosen": "The moon.", "rejected": BRIDGES},
        {"prompt": BRIDGES, "chosen": "Seven names.", "rejected": "No."},
        *({"prompt": f"{TIDES} {n}", "chosen": "The moon.", "rejected": "No."} for n in range(4)),
    ]
    source = FilePreferences(type="jsonl", path=lines(tmp_path / "pairs.jsonl", *rows))
    settings = DatasetsConfig(kinds=["dpo"])
    stage = preferences(
        source, settings, policy, seed=0, val_fraction=0, decontaminate=decontaminate(ifeval), name="rows"
    )
    plain = preferences(source, settings, policy, seed=0, val_fraction=0, name="rows")
    assert stage.fingerprint != plain.fingerprint
    found, files = made(tmp_path, stage, dataset_files(settings, None, (), stage, policy))
    assert found.facts["source"]["dropped"]["contaminated"] == 3 and found.rows == {"dpo": 4}

    card = (Path(files.folder) / "README.md").read_text()
    assert "rows | 3 of 7 overlap with a benchmark; left out" in card
    assert "rows and ifeval (2 texts) | 3 overlap, 2 of them equal" in card
    stats = Folder(files.folder).read_json("stats.json", set_aside=True)
    section = contamination_section(stats["contamination"])
    assert section is not None and section.blocks[-1].rows == [["rows", "ifeval", "2", "7", "3", "2"]]  # type: ignore
    assert contamination_section([]) is None
