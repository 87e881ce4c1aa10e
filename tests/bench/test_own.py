"""Benchmarks under `benchmarks.own`: from a user's file, or a shipped one for the second time."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dags.benchmarks import BenchmarksConfig, benchmarks
from ray_pipeline.config.messages import ConfigError
from tests.bench.test_stages import GOOD, Run, answering, loaded, model, question_files, run, score
from tests.scripted import ScriptedEngine

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "my_benchmark.py")
JUDGED = """
from ray_pipeline.agents.replies import Read
from ray_pipeline.bench.benchmark import question_row
from ray_pipeline.bench.simple import JudgedBenchmark, Verdict
from ray_pipeline.extensions import register

@register("benchmark")
class Polite(JudgedBenchmark):
    def rows(self):
        return [question_row(n, n, [f"greet {n}", f"leave {n}"]) for n in range(4)]

    async def grade(self, engine, question, answers):
        text = f"{question['turns'][1]}\\n{answers[0]}\\n{answers[1]}\\nPolite? yes or no"
        reply = await engine.chat([{"role": "user", "content": text}], self.judge_sampling.sampling())
        if reply.text not in ("yes", "no"):
            return Verdict(None, "unparsed", reply.text)
        return Verdict(float(reply.text == "yes"), "ok", reply.text)
"""


def own(folder: Path, **blocks: Any) -> dict[str, Any]:
    return {
        "run": {"name": "b"},
        "models": [{"name": "good", "model": model(folder, "good")}, model(folder, "bad")],
        "judges": {"judge": {"model": model(folder, "judge")}},
        "benchmarks": {"own": blocks, "floors": ["echo"], "draws": 100},
        "num_shards": 2,
    }


def test_a_benchmark_that_a_program_checks(tmp_path: Path) -> None:
    config = loaded(tmp_path, {**own(tmp_path, sums={"type": EXAMPLE, "below": 4, "limit": 8}), "judges": {}})
    dag = benchmarks(config, str(tmp_path / "run"))

    def adds(messages: Any, sampling: Any) -> str:
        a, b = re.findall(r"\d+", messages[-1]["content"])
        return f"{a} + {b} = {int(a) + int(b)}"

    engines = {
        "bench-answers-good": ScriptedEngine(adds, identity={"model": "good"}),
        "bench-answers-bad": answering("no idea"),
    }
    found = Run(dag, tmp_path / "run", config.num_shards, engines)
    verdicts = found.rows("bench-checks-sums")
    assert len(verdicts) == 3 * 8 and {row["benchmark"] for row in verdicts} == {"sums"}
    for name, value in {"good": 100, "bad": 0}.items():
        one = score(found.document, name, "score", "sums")
        assert (one["value"], one["rows"], one["unread"], one["name"], one["exact"]) == (value, 8, 0, "sums", True)
    assert "sums: score (%)" in (found.page / "benchmarks.md").read_text()
    assert EXAMPLE in (found.page / "report.md").read_text().replace("\\", "")
    assert not [warning for warning in found.document["warnings"] if "floor" in warning]


def test_a_benchmark_that_a_model_judges(tmp_path: Path) -> None:
    (tmp_path / "polite.py").write_text(JUDGED)
    config = loaded(tmp_path, own(tmp_path, polite={"type": str(tmp_path / "polite.py")}))

    def judge(messages: Any, sampling: Any) -> str:
        text = messages[-1]["content"]
        return "hm" if "leave 3" in text else "yes" if text.count(GOOD) == 2 else "no"

    found, engines = run(tmp_path, config, judge)
    one = score(found.document, "good", "score", "polite")
    assert (one["value"], one["rows"], one["unread"], one["worst"], one["best"]) == (100, 3, 1, 75, 100)
    assert score(found.document, "bad", "score", "polite")["value"] == 0
    assert {r["parse_status"] for r in found.rows("bench-judge-judge")} == {"ok", "unparsed"}
    assert found.document["protocols"][one["protocol"]]["judge"] and one["name"].startswith("polite")
    assert "floor echo" in " ".join(found.document["warnings"])  # as good as `bad`
    assert engines["bench-judge-judge"].calls == 3 * 4
    reading = next(r for r in found.document["readings"] if r["model"] == "good")
    assert reading["statuses"] == {"ok": 3, "unparsed": 1}


def test_an_edited_file_reruns_what_refers_to_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(Path(EXAMPLE).read_text())
    values = {**own(tmp_path, sums={"type": str(path)}), "judges": {}}
    values["benchmarks"]["mt_bench"] = None

    def fingerprints() -> dict[str, str]:
        return {stage.name: stage.fingerprint for stage in benchmarks(loaded(tmp_path, values), "/r").stages}

    before = fingerprints()
    assert fingerprints() == before
    path.write_text(path.read_text() + "\n# edited\n")
    after = fingerprints()
    assert all(before[name] != after[name] for name in ("bench-questions", "bench-checks-sums", "benchmarks"))
    values["benchmarks"]["own"]["sums"]["below"] = 11
    assert fingerprints()["bench-questions"] != after["bench-questions"]


def test_a_shipped_benchmark_can_run_again_under_another_name(tmp_path: Path) -> None:
    files = question_files(tmp_path)
    block = {"questions": files["questions"], "references": files["references"], "asking": {"grammar": True}}
    values = own(tmp_path, again={"type": "mt_bench", **block, "limit": 2})
    values["benchmarks"]["mt_bench"] = block
    config = loaded(tmp_path, values)
    found, _ = run(tmp_path, config)
    assert score(found.document, "good", "overall")["rows"] == 6
    assert score(found.document, "good", "overall", "again")["rows"] == 4
    assert (found.page / "again_categories.csv").exists() and (found.page / "mt_bench_categories.csv").exists()
    values["benchmarks"]["own"]["again"]["modes"] = ["pairwise"]
    values["benchmarks"]["own"]["again"]["against"] = "nobody"
    with pytest.raises(ConfigError, match=r"benchmarks\.own\.again\.against is 'nobody', which is not a model"):
        loaded(tmp_path, values)


def test_a_users_benchmark_reaches_another_process(tmp_path: Path) -> None:
    config = loaded(tmp_path, {**own(tmp_path, sums={"type": EXAMPLE, "below": 4}), "judges": {}})
    again = BenchmarksConfig.model_validate(config.model_dump())
    assert again.benchmarks == config.benchmarks and again.benchmarks.own["sums"].decisive()["type"] == EXAMPLE
    code = "import pickle, sys; block = pickle.load(sys.stdin.buffer); print(len(block.rows()))"
    given = pickle.dumps(config.benchmarks)
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, check=True)
    assert done.stdout.split() == [b"10"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"sums": {"type": "sums"}}, r"own\.sums: .*unknown benchmark 'sums'; choose from .*mt_bench"),
        ({"sums": {"below": 3}}, "mapping with the key type"),
        ({"sums": {"type": EXAMPLE, "above": 3}}, "above"),
        ({"sums": {"type": EXAMPLE, "below": 1}}, "greater than or equal to 2"),
        ({"ifeval": {"type": EXAMPLE}}, r"own\.ifeval: the name is taken"),
        ({"../sums": {"type": EXAMPLE}}, "own"),
        ({"polite": {"type": "{folder}/polite.py", "judge": "nobody"}}, r"own\.polite\.judge is 'nobody'"),
    ],
)
def test_a_mistake_is_told_by_its_key(blocks: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "polite.py").write_text(JUDGED)
    for block in blocks.values():
        if "type" in block:
            block["type"] = block["type"].replace("{folder}", str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, own(tmp_path, **blocks))
