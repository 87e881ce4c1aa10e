"""The policy of a run as a folder for the Hugging Face Hub: adapter and merged model, with the run's evaluation results
in their cards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.graph.results import Run, decision, final_round, of_role
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.locations import without_folders
from ray_pipeline.store.markdown import key_table
from ray_pipeline.training.spec import POLICIES

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

FOLDERS = ("adapter", "merged")
#: An absolute local path, as cards of earlier versions have them.
_PATH = re.compile(r"(?<![\w:/.*])/(?:[^\s/|`]+/)+[^\s/|`]*")


def export_policy(run: Run, out: Path, stage: str) -> list[Path]:
    """Copy `adapter/` and `merged/`, as far as the training wrote them, below `out`, and complete their cards.

    Returns:
        The cards.

    Raises:
        StoreError: the stage is not done or trains no policy.
    """
    import pyarrow.fs as pafs

    policies = of_role(run.results, *POLICIES)
    if stage not in [policy.name for policy in policies]:
        others = ", ".join(policy.name for policy in policies) or "none"
        raise StoreError(f"{run.folder.location}: {stage} is not done; finished policies: {others}")
    source, target, cards = Folder(run.results[stage].folder), Folder(str(out)), []
    results = list(evaluation_results(run, stage))
    number, decided = run.stages[stage].round, decision(run.results)
    rounds = "" if decided is None else f"This is the policy of round {number}. {decided.facts['text']}"
    for name in FOLDERS:
        if name in source.folders():
            target.delete_folder(name)
            (target / name).make()
            pafs.copy_files(
                source.path(name), target.path(name), source_filesystem=source.fs, destination_filesystem=target.fs
            )
            _complete(target / name, results, rounds)
            cards.append(out / name / "README.md")
    return cards


def _complete(folder: Folder, results: list[EvalResult], rounds: str) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(_PATH.sub(lambda found: without_folders(found[0]), folder.read_bytes("README.md").decode()))
    if results:
        title = re.search(r"^# (.*)$", card.text, re.MULTILINE)
        data: Any = card.data
        data.model_name, data.eval_results = title[1] if title else "policy", results
        facts = {f"{r.dataset_name}: {r.metric_name}": f"{r.metric_value:.4g}" for r in results}
        card.text = "\n".join([card.text.rstrip(), "", *key_table("Evaluation", facts)])
    if rounds:
        card.text = "\n".join([card.text.rstrip(), "", "## Rounds", "", rounds, ""])
    folder.write_bytes("README.md", str(card).encode())
    if folder.exists("adapter_config.json"):
        config = folder.read_json("adapter_config.json")
        config["base_model_name_or_path"] = without_folders(config.get("base_model_name_or_path") or "")
        folder.write_json("adapter_config.json", config)


def evaluation_results(run: Run, stage: str) -> Iterator[EvalResult]:
    """The figures of a policy in the run's own evaluation and public benchmarks."""
    label = stage.removeprefix("train").removeprefix("-")
    if number := run.stages[stage].round:
        if number != final_round(run.results):
            return  # the page is about that one
        label = ""
    for page in of_role(run.results, "page"):
        folder = Folder(page.folder)
        if folder.exists("metrics.json"):
            numbers = folder.read_json("metrics.json")
            yield from _of_comparison(numbers, label) if label else _of_run(numbers.get("evaluation") or {})
    for page in of_role(run.results, "scores"):
        for name, value in page.facts["scores"].items():
            model, _, measure = name.partition(": ")
            if model == (label or "policy") and value is not None:
                yield _result(measure, measure.rpartition(" ")[0] or measure, measure.rpartition(" ")[2], value)


def _of_run(evaluation: dict[str, Any]) -> Iterator[EvalResult]:
    for rate in evaluation.get("win_rates", ()):
        yield _held_out("win_rate", f"score against the base, judge {rate['judge']}", rate["score"]["mean"])
    for judge, controlled in evaluation.get("length_controlled", {}).items():
        yield _held_out("win_rate", f"the same at equal length, judge {judge}", controlled["score"]["mean"])
    for row in evaluation.get("responses", ()):
        if row["model"] == "policy" and row.get("accuracy"):
            yield _held_out("accuracy", f"accuracy, {row['mode']}", row["accuracy"]["mean"])
    if found := evaluation.get("perplexity", {}).get("policy"):
        yield _held_out("perplexity", "perplexity of desirable answers", found["ppl"])


def _of_comparison(numbers: dict[str, Any], label: str) -> Iterator[EvalResult]:
    for policy in numbers.get("policies", ()):
        if (policy.get("run") or {}).get("label") != label:
            continue
        for name, shown in (("win_rate", "win rate against the base"), ("equal_length", "score at equal length")):
            if policy.get(name) is not None:
                yield _held_out("win_rate", shown, policy[name])
        for mode, share in policy.get("accuracy", {}).items():
            yield _held_out("accuracy", f"accuracy, {mode}", share)


def _held_out(metric: str, shown: str, value: float) -> EvalResult:
    return _result("held-out prompts", "held-out prompts of the run", shown, value, metric)


def _result(dataset: str, dataset_name: str, shown: str, value: float, metric: str = "") -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=dataset_name,
        metric_type=metric or shown,
        metric_name=shown,
        metric_value=float(value),
    )
