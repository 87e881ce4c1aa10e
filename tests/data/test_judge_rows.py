"""Rows that teach a judge, from a planted run and a checker of our own."""

import json
from collections import Counter
from pathlib import Path

from perf.judge_rows import main
from ray_pipeline.graph.results import read_run
from tests.operate.planted_run import plant

CHECKER = """
from ray_pipeline.extensions import register

@register("checker")
def lengths(prompt, response):
    return [1.0, 0.5, 0.0, None][sum(map(ord, response)) % 4]
"""


def test_replies_are_what_the_checker_says_and_right_and_wrong_are_as_many(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", None, "judge.layout=shared_first")
    (tmp_path / "lengths.py").write_text(CHECKER)
    main(str(run), str(tmp_path / "rows.jsonl"), "factuality", str(tmp_path / "lengths.py"))
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    replies = Counter(json.loads(row[-1]["content"])["score"] for row in rows)
    assert replies[10] == replies[1] + replies[6] and min(replies[10], replies[1], replies[6]) > 0 and len(replies) == 3

    results = read_run(str(run)).results
    prompts = {row["prompt_id"]: row for row in results["prompts"].table().read_all().to_pylist()}
    expected: dict[tuple[str, str], int] = {}
    for one in results["candidates"].table().read_all().to_pylist():
        text = prompts[one["prompt_id"]]["messages"][-1]["content"]
        if one["response"] is not None and (rest := sum(map(ord, one["response"])) % 4) < 3:
            expected[text, one["response"]] = [10, 6, 1][rest]
    for row in rows:
        asked = "".join(one["content"] for one in row[:-1])
        scores = {score for (text, response), score in expected.items() if text in asked and response in asked}
        assert json.loads(row[-1]["content"])["score"] in scores and "factuality" in asked
