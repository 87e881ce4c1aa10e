"""The workflow of public benchmarks, stage by stage in this process, with engines that answer from a script."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from dags.benchmarks import BenchmarksConfig, benchmarks
from ray_pipeline.bench.alpaca_eval.benchmark import AlpacaEvalSettings
from ray_pipeline.bench.mt_bench.questions import CATEGORY_TEMPERATURES
from ray_pipeline.bench.report import rewrite_page
from ray_pipeline.config.loading import load_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.constraints.official import Checkers
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.graph.stage import Dag, ShardInput, ShardWork, StageResult, WholeInput
from ray_pipeline.store.files import Folder
from ray_pipeline.workflow.registry import find_workflow
from tests.scripted import ScriptedEngine, said

GOOD, BAD = "a GOOD answer", "BAD"
REFERENCE = "middling"
_WORTH = {GOOD: 9, REFERENCE: 6, BAD: 2}


def model(folder: Path, name: str) -> str:
    """A folder that identifies a model; nothing here loads it."""
    made = folder / name
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"name": name}))
    (made / "tokenizer.json").write_text("{}")
    return str(made)


def question_files(folder: Path) -> dict[str, str]:
    files = {
        "questions": [
            {"question_id": n, "category": c, "turns": [f"first of {n}", f"second of {n}"]}
            for n, c in ((81, "writing"), (111, "math"), (121, "coding"))
        ],
        "references": [{"question_id": n, "choices": [{"turns": ["r1", "r2"]}]} for n in (111, 121)],
        "reference": [
            {"instruction": f"do {n}", "output": REFERENCE + n % 2 * " and longer than any answer", "dataset": "d"}
            for n in range(6)
        ],
        "prompts": [
            {"key": 7, "prompt": "no commas", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
            {"key": 8, "prompt": "say GOOD", "instruction_id_list": ["keywords:existence"],
             "kwargs": [{"keywords": ["good"]}]},
        ],
    }  # fmt: skip
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in files}


def written(folder: Path, *, ifeval: bool = False, **changes: Any) -> dict[str, Any]:
    files = question_files(folder)
    blocks: dict[str, Any] = {
        "mt_bench": {
            "questions": files["questions"],
            "references": files["references"],
            "modes": ["single", "pairwise"],
            "against": "bad",
            "asking": {"grammar": True},
        },
        "alpaca_eval": {"reference": files["reference"], "gamed": None, "order": "both"},
        "floors": ["x", "echo"],
        "draws": 100,
    }
    if ifeval:
        blocks["ifeval"] = {"prompts": files["prompts"]}
    return {
        "run": {"name": "b"},
        "models": [{"name": "good", "model": model(folder, "Qwen3-good")}, model(folder, "bad")],
        "judges": {"judge": {"model": model(folder, "qwen3-judge")}},
        "benchmarks": blocks,
        "num_shards": 2,
        **changes,
    }


def loaded(folder: Path, values: dict[str, Any]) -> BenchmarksConfig:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(BenchmarksConfig, str(path))


def answering(text: str) -> ScriptedEngine:
    return ScriptedEngine(text, identity={"model": text})


def worth_of(content: str) -> list[tuple[int, int]]:
    """(place, worth) of every known answer in what a judge is shown, in the order shown; what is unknown is worth 1."""
    return sorted((content.index(text), worth) for text, worth in _WORTH.items() if text in content)


def judging(messages: Any, sampling: Any) -> Any:
    """A judge that knows what an answer is worth, prefers the first of equals, and says so in each benchmark's form."""
    content = messages[-1]["content"]
    shown = worth_of(content)
    if sampling.logprobs:
        # The unknown answers (floors) are worth 1; the reference is always shown.
        place = content.index(REFERENCE)
        other = next((w for _, w in shown if w != 6), 1)
        first_is_reference = place < content.index("<output_of_M ")
        better = (other < 6) == first_is_reference
        p = 0.9 if better else 0.1
        return said("m", logprobs=[[("m", math.log(p)), ("M", math.log(1 - p))]])
    if "ABC" in sampling.grammar.decoded():
        good = content.find(GOOD)
        bad = content.find(BAD)
        return "[[C]]" if good < 0 else "[[A]]" if good < bad else "[[B]]"
    # The last answer is the one that is graded; the second turn shows the first one's too.
    return f"Rating: [[{shown[-1][1] if shown else 1}]]"


class Run:
    """A DAG made in this process, as the graph would make it: shard by shard, with the call log in front."""

    def __init__(self, dag: Dag, folder: Path, num_shards: int, engines: dict[str, ScriptedEngine]) -> None:
        self.folder, self.results, self.logged = folder, {}, []  # type: ignore[var-annotated]
        self.watched: list[tuple[str, bool]] = []
        for stage in dag.stages:
            place = Folder(f"{folder}/{stage.folder_name}")
            parents = {role: self.results[parent.name] for role, parent in stage.inputs.items()}
            facts: dict[str, Any] = {}
            result = StageResult(
                stage.name, stage.fingerprint, place.location, num_shards, stage.work.tables, {}, facts,
                role=stage.role_name,
            )  # fmt: skip
            if isinstance(stage.work, ShardWork):
                for shard in range(num_shards):
                    tables: dict[str, Any] = {}
                    for role, parent in parents.items():
                        for kind in parent.tables:
                            name = role if len(parent.tables) == 1 else f"{role}.{kind}"
                            tables[name] = parent.table(kind).read(shard)
                    self._shard(stage, shard, num_shards, tables, engines.get(stage.name), result)
            else:
                facts |= stage.work.function(
                    WholeInput(
                        parents, place, Folder(f"{folder}/calls"), stage.fingerprint, num_shards, stage.work.settings,
                        self.logged.append, lambda *step: None,
                    )
                )  # fmt: skip
            self.results[stage.name] = result

    def _shard(self, stage: Any, shard: int, of: int, tables: Any, engine: Any, result: StageResult) -> None:
        def given(log: Any) -> ShardInput:
            watch = lambda name, read: self.watched.append((name, read))  # noqa: E731
            return ShardInput(shard, of, tables, {}, log, stage.work.settings, lambda n: None, watch)

        async def ask() -> Any:
            assert engine is not None, f"{stage.name} wants an engine"
            async with LoggedEngine(engine, Folder(f"{self.folder}/calls"), shard, of) as log:
                return await stage.work.function(given(log))

        output = asyncio.run(ask()) if stage.work.engine else stage.work.function(given(None))
        assert tuple(output.tables) == stage.work.tables
        for kind, table in output.tables.items():
            result.table(kind).write(shard, table)

    def rows(self, stage: str, kind: str | None = None) -> list[dict[str, Any]]:
        return self.results[stage].table(kind).read_all().to_pylist()

    @property
    def page(self) -> Path:
        return Path(Folder(self.results["benchmarks"].folder).path())

    @property
    def document(self) -> dict[str, Any]:
        return json.loads((self.page / "benchmarks.json").read_text())


def run(folder: Path, config: BenchmarksConfig, judge: Any = judging) -> tuple[Run, dict[str, ScriptedEngine]]:
    engines = {
        "bench-answers-good": answering(GOOD),
        "bench-answers-bad": answering(BAD),
        "bench-judge-judge": ScriptedEngine(judge, identity={"model": "judge"}),
    }
    return Run(benchmarks(config, str(folder / "run")), folder / "run", config.num_shards, engines), engines


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, ScriptedEngine], BenchmarksConfig]:
    folder = tmp_path_factory.mktemp("benchmarks")
    config = loaded(folder, written(folder))
    return (*run(folder, config), config)


def score(document: dict[str, Any], model: str, metric: str, benchmark: str = "mt_bench") -> dict[str, Any]:
    (found,) = [
        s for s in document["scores"] if (s["model"], s["benchmark"], s["metric"]) == (model, benchmark, metric)
    ]
    return found


def test_every_model_answers_both_turns_at_the_temperature_of_the_category(whole: Any) -> None:
    found, engines, _ = whole
    rows = found.rows("bench-answers-good")
    assert len(rows) == 3 * 2 + 6
    assert {r["answer"] for r in rows} == {GOOD}
    asked = engines["bench-answers-good"].asked
    second = [m for m, _ in asked if m[-1]["content"].startswith("second")]
    assert [m["role"] for m in second[0]] == ["user", "assistant", "user"] and second[0][1]["content"] == GOOD
    for messages, sampling in asked:
        if "111" in messages[-1]["content"]:
            assert sampling.temperature == CATEGORY_TEMPERATURES["math"] == 0 and sampling.seed is None
        if "81" in messages[-1]["content"]:
            assert sampling.temperature == 0.7 and sampling.seed is not None and sampling.max_tokens == 1024
    warm = {
        r: [s.seed for m, s in engines[f"bench-answers-{r}"].asked if "81" in m[0]["content"]] for r in ("good", "bad")
    }
    assert sorted(warm["good"]) == sorted(warm["bad"]) and len(set(warm["good"])) == 2


def test_scores_are_what_a_few_lines_over_the_tables_give(whole: Any) -> None:
    found, _, _ = whole
    document = found.document
    ratings = found.rows("bench-judge-judge", "bench_ratings")
    assert len(ratings) == 4 * 3 * 2  # two models, two floors
    for name in ("good", "bad", "floor:x"):
        mine = [r["score"] for r in ratings if r["model"] == name]
        assert score(document, name, "overall")["value"] == pytest.approx(statistics.mean(mine))
    assert score(document, "good", "turn 2")["value"] == 9
    assert score(document, "floor:x", "overall")["value"] == 1

    pairs = found.rows("bench-judge-judge", "bench_comparisons")
    mine = {(r["question_id"], r["turn"], r["order"]): r["choice"] for r in pairs if r["model"] == "good"}
    assert len(mine) == 3 * 2 * 2
    assert all(choice == ("A" if order == "ab" else "B") for (_, _, order), choice in mine.items())
    for part in ("", ", turn 1", ", turn 2"):
        assert score(document, "good", f"pairwise against bad{part}")["value"] == 100
    pairs = [c for c in document["mt_bench_categories"] if c["turn"] == "both, pairwise against bad"]
    assert {c["value"] for c in pairs if c["model"] == "good"} == {100} and {c["unit"] for c in pairs} == {"%"}
    assert score(document, "floor:x", "pairwise against bad")["value"] == 50  # all ties
    assert not [s for s in document["scores"] if s["model"] == "bad" and "pairwise" in s["metric"]]

    preferences = found.rows("bench-judge-judge", "bench_preferences")
    mean = statistics.mean(
        r["first"] if r["place"] == "first" else 1 - r["first"] for r in preferences if r["model"] == "good"
    )
    rate = score(document, "good", "WR", "alpaca_eval")
    assert rate["value"] == pytest.approx(100 * mean) and mean == pytest.approx(0.9)
    assert score(document, "bad", "WR", "alpaca_eval")["value"] == pytest.approx(10)
    controlled = score(document, "good", "LC", "alpaca_eval")
    assert 50 < controlled["value"] <= 100 and "no difficulties" in controlled["note"]
    shorter = score(document, "bad", "LC", "alpaca_eval")
    assert shorter["value"] is None  # shorter than every reference: no pair at equal length
    reading = next(r for r in document["readings"] if (r["model"], r["benchmark"]) == ("good", "alpaca_eval"))
    assert reading["flip_rate"] == 0 and reading["mean_chars"] == len(GOOD)


def test_math_and_coding_are_graded_with_their_references_and_others_without(whole: Any) -> None:
    _, engines, _ = whole
    shown = [
        m[-1]["content"] for m, s in engines["bench-judge-judge"].asked if s.grammar and "Rating" in s.grammar.value
    ]
    for content in shown:
        assert ("r1" in content) == ("of 111" in content or "of 121" in content)
        if "second of" in content:
            assert "first of" in content


def test_only_the_whole_file_of_the_hub_has_the_published_instructions() -> None:
    assert AlpacaEvalSettings().published_instructions
    at = "hf://datasets/tatsu-lab/alpaca_eval@0123abc/alpaca_eval_gpt4_baseline.json"
    assert AlpacaEvalSettings(reference=at).published_instructions
    assert not AlpacaEvalSettings(reference="/data/alpaca_eval_gpt4_baseline.json").published_instructions
    assert not AlpacaEvalSettings(limit=10).published_instructions


def test_a_score_is_called_by_its_protocol_and_never_by_the_benchmarks_own_name(whole: Any) -> None:
    found, _, _ = whole
    for one in found.document["scores"]:
        assert not one["exact"] and "-style" in one["name"] and "judge weights" in one["name"]
        assert one["protocol"] in found.document["protocols"]
    reference = score(found.document, "good", "WR", "alpaca_eval")
    assert reference["name"].startswith("AlpacaEval-2-style WR, judge weights ")
    assert "order" in reference["departures"] and "reference_answers" in reference["departures"]


def test_the_table_comes_in_three_forms_with_a_column_a_model_and_floors_last(whole: Any) -> None:
    found, _, _ = whole
    with open(found.page / "benchmarks.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.document["scores"]) == 4 * 3 + 3 * 3 + 4 * 2
    assert {r["model"] for r in rows} == {"good", "bad", "floor:x", "floor:echo"}
    markdown = (found.page / "benchmarks.md").read_text().splitlines()
    assert markdown[0] == "| score | good | bad | floor:x | floor:echo |"
    assert len(markdown) == 2 + 3 + 3 + 2
    overall = next(line for line in markdown if ": overall" in line)
    assert overall.split(" | ")[1].startswith("9.00 (3.34 to 9.71)")  # exact: all three questions are equal
    latex = (found.page / "benchmarks.tex").read_text()
    assert latex.count(r"\\") == 1 + 8 and "floor:echo" in latex and "9.00 (3.34--9.71)" in latex
    assert r"\%" in latex and "–" not in latex
    page = (found.page / "report.md").read_text()
    for heading in ("## How answers were read", "## MT-Bench by category", "## Protocols", "## The run"):
        assert heading in page
    assert len(list(csv.DictReader((found.page / "alpaca_eval_instructions.csv").open()))) == 4 * 6


def test_pairs_are_told_by_turn_and_by_category_with_intervals(whole: Any) -> None:
    found, _, _ = whole
    turns = [s for s in found.document["scores"] if s["metric"].startswith("pairwise against bad, turn ")]
    assert {(s["model"], s["metric"][-1]) for s in turns} == {
        (model, turn) for model in ("good", "floor:x", "floor:echo") for turn in "12"
    }
    rows = [r for r in found.document["mt_bench_categories"] if "pairwise against bad" in r["turn"]]
    asked = {r["category"] for r in found.document["mt_bench_categories"]}
    assert {(r["model"], r["category"]) for r in rows} == {
        (model, category) for model in ("good", "floor:x", "floor:echo") for category in asked
    }
    assert all(one["unit"] == "%" and one["low"] <= one["value"] <= one["high"] for one in turns)
    # Every category has one question here, which cannot be resampled; its row has its value all the same.
    assert all(one["unit"] == "%" and one["value"] is not None and one["low"] is None for one in rows)
    html = (found.page / "report.html").read_text()
    assert "pairwise against bad, turn 2" in html and "both, pairwise against bad" in html


def test_a_judge_of_a_candidates_family_is_warned_of(whole: Any) -> None:
    found, _, _ = whole
    (told,) = [w for w in found.document["warnings"] if "family" in w]
    assert "qwen3-judge" in told and "good" in told and "bad" not in told


def test_answers_that_were_cut_off_are_counted_and_warned_of(whole: Any, tmp_path: Path) -> None:
    """K4.1"""
    config = loaded(tmp_path, written(tmp_path))
    engines = {
        "bench-answers-good": answering(GOOD),
        "bench-answers-bad": ScriptedEngine(said(BAD, "length"), identity={"model": BAD}),
        "bench-judge-judge": ScriptedEngine(judging, identity={"model": "judge"}),
    }
    cut = Run(benchmarks(config, str(tmp_path / "run")), tmp_path / "run", config.num_shards, engines)
    told = [w for w in cut.document["warnings"] if "cut off" in w]
    assert told == [
        "alpaca_eval, bad: 6 of 6 answers were cut off, and were judged as they are.",
        "mt_bench, bad: 6 of 6 answers were cut off, and were judged as they are.",
    ]
    assert "12 answers cut off" in (cut.page / "report.md").read_text()
    assert "0 answers cut off" in (whole[0].page / "report.md").read_text()


def test_a_second_run_asks_nobody_and_a_reworded_judge_prompt_asks_judges_alone(
    whole: Any, tmp_path: Path, capsys: Any
) -> None:
    found, _, config = whole
    again = benchmarks(config, str(found.folder))
    engines = {name: ScriptedEngine(AssertionError("nobody is asked")) for name in found.results}
    for name, engine in engines.items():
        if name.startswith("bench-answers-"):
            engine._identity = {"model": GOOD if name.endswith("good") else BAD}
        if name.startswith("bench-judge"):
            engine._identity = {"model": "judge"}
    Run(again, found.folder, config.num_shards, engines)
    fewer = config.benchmarks.mt_bench.model_copy(update={"modes": ("single",)})
    other = config.model_copy(update={"benchmarks": config.benchmarks.model_copy(update={"mt_bench": fewer})})
    before, after = ({s.name: s.fingerprint for s in benchmarks(c, "/r").stages} for c in (config, other))
    assert {name for name in before if before[name] != after[name]} <= {"bench-judge-judge", "benchmarks"}
    assert before["bench-judge-judge"] != after["bench-judge-judge"]


def test_a_judge_that_cannot_be_read_leaves_bounds_and_no_score(tmp_path: Path) -> None:
    values = written(tmp_path)
    values["benchmarks"]["mt_bench"]["modes"] = ["single"]
    config = loaded(tmp_path, values)
    found, _ = run(tmp_path, config, judge=lambda messages, sampling: "no idea")
    overall = score(found.document, "good", "overall")
    assert overall["value"] is None and (overall["worst"], overall["best"]) == (1, 10) and overall["unread"] == 6
    assert "no rating could be read" in overall["note"]
    rate = score(found.document, "good", "WR", "alpaca_eval")
    assert rate["value"] is None and (rate["worst"], rate["best"]) == (0, 100)
    assert any("6 of 6 could not be read" in w for w in found.document["warnings"])
    assert "| – |" in (found.page / "benchmarks.md").read_text()


def test_ifeval_runs_on_the_official_checkers_and_unknown_instructions_are_refused(
    tmp_path: Path, official: Checkers
) -> None:
    values = written(tmp_path, ifeval=True)
    del values["benchmarks"]["mt_bench"], values["benchmarks"]["alpaca_eval"]
    values["judges"] = {}
    config = loaded(tmp_path, values)
    found, _ = run(tmp_path, config)
    value = {m: score(found.document, m, "prompt, strict", "ifeval")["value"] for m in ("good", "bad", "floor:echo")}
    assert value == {"good": 100, "bad": 50, "floor:echo": 100}  # the echo says "say GOOD"
    assert score(found.document, "good", "prompt, strict", "ifeval")["name"].startswith("IFEval-style")
    assert found.document["ifeval_types"]
    path = tmp_path / "prompts.jsonl"
    path.write_text(path.read_text().replace("punctuation:no_comma", "punctuation:no_such"))
    with pytest.raises(ConfigError, match=r"prompt 7 of .*punctuation:no_such, which no checker supports"):
        loaded(tmp_path, values)


def test_the_page_can_be_written_anew_from_a_run(whole: Any) -> None:
    from ray_pipeline.graph.results import Run as Stored
    from ray_pipeline.graph.results import StageRecord

    found, _, config = whole
    stages = {
        name: StageRecord(name, name, result.role, "", Path(result.folder).name, result.tables, {}, "done")
        for name, result in found.results.items()
    }
    stored = Stored(
        Folder(str(found.folder)),
        "benchmarks",
        "benchmarks",
        stages,
        found.results,
        config.num_shards,
        page=config.page().model_dump(mode="json"),
    )
    before = (found.page / "benchmarks.csv").read_bytes()
    (found.page / "benchmarks.csv").unlink()
    assert rewrite_page(stored).location.endswith("/report")
    assert (found.page / "benchmarks.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judges": {}}, "benchmarks.mt_bench.judge is 'judge', which is not defined under judges"),
        ({"benchmarks": {}}, "no benchmark is chosen"),
        ({"benchmarks": {"mt_bench": {"against": "x", "modes": ["pairwise"]}}}, "against is 'x', which is not a model"),
        ({"benchmarks": {"mt_bench": {"qestions": "x"}}}, r"mt_bench\.qestions: unknown key"),
        ({"judges": {}, "benchmarks": {"ifeval": {"prompts": "/no/such.jsonl"}}}, "there is no file /no/such.jsonl"),
        ({"judges": {}, "benchmarks": {"ifeval": {"prompts": "pocket:nothing"}}}, "unknown pocket questions"),
        ({"benchmarks": {"alpaca_eval": {"labels": ["1", "2"]}}}, "labels is read only with a prompt file"),
        ({"models": [{"name": "a", "polcy": "x"}]}, r"models\.0 names no model"),
        ({"models": [{"run": "/no/such/run"}]}, "is not a run folder with a policy"),
        ({"models": [{"name": "bad", "model": "/no/such/model"}]}, r"models\.bad: .*no/such/model"),
        ({"num_shards": 3}, "num_shards must divide"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_its_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, {**written(tmp_path), **changes})


@pytest.mark.parametrize("dag", ["dmapo", "baselines"])
def test_benchmarks_are_the_last_stage_of_a_training_run_by_config(dag: str, tmp_path: Path) -> None:
    name = {"dmapo": "configs/pocket.yaml", "baselines": "configs/pocket_baselines.yaml"}[dag]
    blocks = "{mt_bench: {questions: 'pocket:mt_bench', references: null, modes: [single, pairwise]}, floors: [x]}"
    workflow = find_workflow(dag)
    config = load_config(workflow.config, name, [f"benchmarks={blocks}"])
    stages = {s.name: s for s in workflow.wire(config, str(tmp_path)).stages}
    plain = {s.name: s for s in workflow.wire(load_config(workflow.config, name), str(tmp_path)).stages}
    # The page of the run reads the scores, and changes with them; nothing before it does.
    assert list(stages)[-1] == "evaluate" and stages["benchmarks"].view == "benchmarks"
    assert "benchmarks" in stages["evaluate"].inputs
    changed = {name for name, stage in plain.items() if stages[name].fingerprint != stage.fingerprint}
    assert changed == {"evaluate"}
    for label in ["base", *config.policy_labels()]:
        trained = [] if label == "base" else ["train" if dag == "dmapo" else f"train-{label}"]
        assert [s.name for s in stages[f"bench-answers-{label}"].inputs.values()] == ["bench-questions", *trained]
    with pytest.raises(ConfigError, match=r"benchmarks\.mt_bench\.against is 'nobody'"):
        load_config(workflow.config, name, [f"benchmarks={blocks}", "benchmarks.mt_bench.against=nobody"])
    with pytest.raises(ConfigError, match=r"mt_bench\.judge is 'nobody', which is not defined under models"):
        load_config(workflow.config, name, [f"benchmarks={blocks}", "benchmarks.mt_bench.judge=nobody"])


def test_two_models_of_one_name_are_refused_and_a_run_folder_gives_its_policy(tmp_path: Path) -> None:
    values = written(tmp_path)
    values["models"] = [values["models"][1]] * 2
    with pytest.raises(ConfigError, match="two models are called bad"):
        loaded(tmp_path, values)
    finished = tmp_path / "finished"
    merged = finished / "train-abc" / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text('{"name": "policy"}')
    (merged / "tokenizer.json").write_text("{}")
    base = str(tmp_path / "bad")
    (finished / "manifest.json").write_text(
        json.dumps(
            {
                "dag": "dmapo",
                "num_shards": 2,
                "stages": {
                    "train": {
                        "status": "done",
                        "path": "train-abc",
                        "fingerprint": "abc",
                        "tables": [],
                        "group": "train",
                        "rows": {},
                        "facts": {},
                        "usage": {},
                    }
                },
                "config": {"train": {"model": "p"}, "models": {"p": {"model": base, "dtype": "float32"}}},
                "report": {"curating": {"helpfulness": "qwen3-judge"}},
            }
        )
    )
    values["models"] = [base, str(finished)]
    found = loaded(tmp_path, values)
    assert list(found.models) == ["bad", "finished"]
    policy = found.models["finished"]
    assert policy.model == str(merged) and policy.dtype == "float32"
    assert found.page().models["finished"].curating == ("qwen3-judge",)
    values["models"] = [base, {"run": str(finished), "policy": "kto"}]
    with pytest.raises(ConfigError, match="has no policy 'kto'; there are its only policy"):
        loaded(tmp_path, values)


def test_the_shipped_files_are_whole_and_the_pocket_questions_are_in_the_published_forms() -> None:
    shipped = Path(__file__).parents[2] / "configs"
    real = BenchmarksConfig.model_validate(yaml.safe_load((shipped / "benchmarks.yaml").read_text()))
    assert list(real.benchmarks.chosen) == ["mt_bench", "alpaca_eval", "ifeval"] and len(real.benchmarks.floors) == 4
    assert all(source.startswith("hf://") for source in real.benchmarks.sources().values())
    pocket = BenchmarksConfig.model_validate(yaml.safe_load((shipped / "pocket_benchmarks.yaml").read_text()))
    rows = pocket.benchmarks.rows()
    assert [sum(r["benchmark"] == b for r in rows) for b in pocket.benchmarks.chosen] == [8, 12, 12]
    assert {r["category"] for r in rows if r["benchmark"] == "mt_bench" and r["references"]} == {
        "math", "reasoning", "coding"
    }  # fmt: skip
