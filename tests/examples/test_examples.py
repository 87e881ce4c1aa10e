"""Every file of examples/ runs as its first lines say."""

import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

import ray_pipeline as quorum
from ray_pipeline.data.checkers import with_truth
from ray_pipeline.policy.comparisons import EvaluateSettings
from ray_pipeline.training.methods import method_label, method_of, validate_trainer_args
from ray_pipeline.training.spec import TrainSettings
from ray_pipeline.workflow.registry import find_workflow
from tests.bench.test_stages import Run
from tests.interpreter import interpreter
from tests.operate.planted_run import plant
from tests.scripted import ScriptedEngine

ROOT = Path(__file__).parents[2]


def run(*arguments: str, timeout: float = 600) -> str:
    done = subprocess.run(
        [interpreter(), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_read_a_run(tmp_path: Path) -> None:
    printed = run("examples/read_a_run.py", str(plant(tmp_path / "run")))
    assert "desirable" in printed and "helpfulness" in printed


def test_judge_a_dataframe_is_short() -> None:
    text = (ROOT / "examples" / "judge_a_dataframe.py").read_text()
    code = [line for line in text.split('"""')[2].splitlines() if line.strip()]
    assert len(code) <= 12


@pytest.mark.e2e
def test_judge_a_dataframe() -> None:
    printed = run("examples/judge_a_dataframe.py")
    assert printed.count(" desirable ") == 2 and printed.count("undesirable") == 1


def test_my_method_is_another_loss_of_the_same_trainer() -> None:
    settings = TrainSettings.model_validate({"method": "examples/my_method.py", "batch_size": 2})
    method = method_of(settings.method)
    assert (method.data, settings.beta, method_label(settings.method)) == ("dpo", 0.1, "ipo")
    assert method.settings["loss_type"] == ["ipo"] and method.config_class().__name__ == "DPOConfig"
    with pytest.raises(ValueError, match="loss_type cannot be set: another loss would not be IPO"):
        validate_trainer_args(settings.method, {"loss_type": ["hinge"]})


def test_my_workflow_is_wired_from_its_file() -> None:
    config = quorum.load_config("examples/my_workflow.py", "examples/my_workflow.yaml", ["candidates.k=2"])
    dag = find_workflow("examples/my_workflow.py").wire(config, "run")
    assert [stage.name for stage in dag.stages] == ["prompts", "candidates"] and config.candidates.k == 2


def test_my_benchmark_is_checked_by_its_program(tmp_path: Path) -> None:
    changes = ["benchmarks.own.sums.type=examples/my_benchmark.py", "benchmarks.own.sums.below=3"]
    none = ["judges={}", *(f"benchmarks.{name}=null" for name in ("mt_bench", "alpaca_eval", "ifeval"))]
    config = quorum.load_config("benchmarks", "configs/pocket_benchmarks.yaml", [*changes, *none])
    dag = find_workflow("benchmarks").wire(config, str(tmp_path))
    assert {"bench-questions", "bench-answers-base", "bench-checks-sums", "benchmarks"} < {s.name for s in dag.stages}
    answers = ScriptedEngine(lambda messages, _: "It is 4." if "2 + 2" in messages[0]["content"] else "5")
    found = Run(dag, tmp_path, config.num_shards, {"bench-answers-base": answers})
    right = {(row["model"], row["question_id"]) for row in found.rows("bench-checks-sums") if row["score"] == 1}
    assert {question for model, question in right if model == "base"} == {"2+2"}
    scores = {one["model"]: one["value"] for one in found.document["scores"]}
    assert scores["base"] == pytest.approx(100 / 6) and scores["floor:empty"] == 0


@pytest.mark.e2e
def test_my_workflow(tmp_path: Path) -> None:
    common = ("-m", "ray_pipeline.cli", "run", "examples/my_workflow.py", "-c", "examples/my_workflow.yaml")
    run(*common, "--run-dir", str(tmp_path / "run"))
    tables = quorum.read_run(str(tmp_path / "run"))
    assert tables.names == ["prompts", "candidates"] and tables.candidates.num_rows == 24 * 4


def test_my_checker_decides_what_is_right() -> None:
    settings = EvaluateSettings.model_validate({"checker": "examples/my_checker.py"})
    prompts = pa.table(
        {
            "prompt_id": ["a", "b"],
            "messages": [[{"role": "user", "content": "What is 2 + 2?"}], [{"role": "user", "content": "Why?"}]],
            "source": ["my_source", "elsewhere"],
            "meta": ["{}", "{}"],
        }
    )
    answers = pa.table({"prompt_id": ["a", "a", "a", "b"], "response": ["It is 4.", "5", None, "4"]})
    assert with_truth(answers, prompts, settings.checker)["correct"].to_pylist() == [True, False, None, None]
    assert with_truth(answers, prompts) is answers
    assert "checker" in settings.model_dump() and "checker" not in EvaluateSettings().model_dump()
