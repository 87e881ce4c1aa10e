"""The shipped files against the published values in docs/published.md, their placement, and their budgets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_pipeline.agents.debate import load_debate_templates
from ray_pipeline.agents.feedback_loop import load_feedback_templates
from ray_pipeline.agents.strategies import load_strategy_templates
from ray_pipeline.config.loading import read_config
from ray_pipeline.operate.plan import plan
from ray_pipeline.operate.prices import Rates
from ray_pipeline.workflow.registry import find_workflow
from tests.golden.test_goldens import SHIPPED, outside_world

ROOT = Path(__file__).parents[2]
DASH = "–"
GPUS = 8
ON_EIGHT = ("dmapo", "baselines", "ablations", "fellowship", "fellowship_winrate")


def values(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text("utf-8"))
    return loaded


def config(name: str, changed: Mapping[str, Any] | None = None) -> Any:
    return read_config(find_workflow(SHIPPED[name]).config, changed or values(name), [])


# --- values -----------------------------------------------------------------------------------------------------------


def table() -> Iterator[list[str]]:
    """Rows of docs/published.md: what, published, where, files, key, ours, why different."""
    for line in (ROOT / "docs" / "published.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if line.startswith("|") and len(cells) == 7 and cells[0] != "what" and set(cells[0]) != {"-"}:
            yield cells


def at(found: Any, key: str) -> Any:
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, (list, tuple)) else found[part]
    return found


def shown(value: Any) -> Any:
    """A value as a cell has it: names of a mapping or a list, separated by commas."""
    if isinstance(value, (dict, list, tuple)):
        return ", ".join(map(str, value))
    return value


ROWS = list(table())


def test_the_tables_are_read() -> None:
    assert len(ROWS) > 60
    assert {name for row in ROWS for name in row[3].split(", ")} == set(ON_EIGHT)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[4].replace("{live.}", ""))
def test_a_key_has_the_value_of_the_table(row: Sequence[str]) -> None:
    _, published, where, files, key, ours, why = row
    assert where and (why or published not in (DASH, "")), "a value that nobody has published needs its reason"
    for name in files.split(", "):
        place = key.replace("{live.}", "live." if name == "fellowship_winrate" else "")
        assert shown(at(config(name).model_dump(), place)) == yaml.safe_load(ours), (name, place)
    if published not in (DASH, "yes") and yaml.safe_load(published) != yaml.safe_load(ours):
        assert why, f"{key} differs from the published value without a reason"


@pytest.mark.parametrize("name", ["baselines", "ablations"])
def test_every_row_of_a_comparison_has_every_benchmark(name: str, tmp_path: Path) -> None:
    found = config(name)
    assert set(found.benchmarks.chosen) == {"mt_bench", "alpaca_eval", "ifeval"}
    assert found.training("kto", 0).global_batch == 16
    with outside_world(tmp_path):
        stages = {stage.name for stage in find_workflow(SHIPPED[name]).wire(found, str(tmp_path / "run")).stages}
    for label in ("base", *found.policy_labels()):
        assert {f"bench-answers-{label}", f"responses-{label}"} <= stages


# --- placement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_EIGHT)
def test_every_stage_of_a_file_for_eight_gpus_uses_them(name: str) -> None:
    found = config(name)
    local = {key: model for key, model in found.served().items() if model.is_here}
    used = {key: model.placement.max_actors * model.tensor_parallel_size for key, model in local.items()}
    assert used and set(used.values()) == {GPUS}, used
    assert all(model.placement.num_gpus in (None, model.tensor_parallel_size) for model in local.values())
    assert set(found.workers().values()) <= {GPUS}


# --- budgets ----------------------------------------------------------------------------------------------------------

#: Rows of each dataset that a shipped file reads in full, and tokens of a prompt: what their cards say, and a guess.
SIZES = {
    "openbmb/UltraFeedback": (63_967, 200),
    "nvidia/HelpSteer2": (20_324, 200),
    "argilla/distilabel-capybara-dpo-7k-binarized": (7_563, 800),
    "HuggingFaceH4/no_robots": (9_500, 200),
}
DRAWN = 200


def stand_in(block: dict[str, Any], folder: Path) -> float:
    """Replace the sources of a `prompts` block by a file of prompts alike; returns real ones for each."""
    rows, number = [], 0
    for source in block["sources"]:
        size, tokens = SIZES[source["name"]]
        number += min(source.get("limit", size), size)
        rows += [{"prompt": f"{source['name']} {i} " + "word " * (tokens * 4 // 5)} for i in range(DRAWN)]
    file = folder / f"{len(list(folder.iterdir()))}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block["sources"] = [{"type": "jsonl", "path": str(file), "column": "prompt"}]
    return number / len(rows)


@pytest.mark.parametrize("name", sorted(n for n in SHIPPED if "budget" in (ROOT / f"configs/{n}.yaml").read_text()))
def test_a_budget_covers_the_bill_that_is_planned(name: str, tmp_path: Path) -> None:
    given = values(name)
    blocks = [given["live"]["prompts"]] if "live" in given else [given["prompts"]]
    blocks += [given["improve"]["prompts"]] if "improve" in given else []
    share = max(stand_in(block, tmp_path) for block in blocks)
    with outside_world(tmp_path):
        found = config(name, given)
        dag = find_workflow(SHIPPED[name]).wire(found, str(tmp_path / "run"))
        made = plan(found, dag, Rates(), lambda key, model: lambda said: sum(len(m["content"]) for m in said) // 4)
    bills: dict[str, float] = {}
    for stage in made.stages:
        bills[stage.model] = bills.get(stage.model, 0.0) + share * (stage.money or 0.0)
    budgets = {key.split(".")[1]: model.endpoint.budget for key, model in found.served().items() if model.endpoint}
    assert budgets and all(budget is not None for budget in budgets.values())
    for model, budget in budgets.items():
        print(f"{name}: {model} {bills[model]:.0f} of {budget:.0f} {made.currency}")
        assert 0 < bills[model] <= budget
        assert bills[model] > budget / 5, "a limit far above the bill limits nothing"


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_published_prompts_are_one_set_and_say_whose_words_they_are() -> None:
    folder = ROOT / "configs" / "prompts" / "published"
    assert {file.stem for file in folder.iterdir()} == {"debate", "feedback", "strategies"}
    for file in folder.iterdir():
        head = " ".join(line.removeprefix("# ") for line in file.read_text().splitlines() if line.startswith("#"))
        assert "tables 7 to 11" in head and "in the project's own words; the published texts are not here" in head
    strategies, debate = load_strategy_templates("published"), load_debate_templates("published")
    assert [role.title for role in debate.roles] == ["General Public", "Psychologist", "Critic"]
    for block in (strategies.direct, strategies.independent, strategies.combined):
        assert block is not None and block.rubric.index("Evaluation evidence") < block.rubric.index("nothing after")
    review = load_feedback_templates("published").review.rubric
    assert review.index("what is good") < review.index("what is wrong") < review.index('"score"')
