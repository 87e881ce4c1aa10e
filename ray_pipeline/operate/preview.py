"""The first prompts of a run, through to its decisions, to read before the big run.

A preview is a run like any other, in a folder of its own beside the planned run, with the planned run's call log. Its
prompts are those of the smallest hash, so they are among the run's prompts, and the run does not pay for these calls
again.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from ray_pipeline.agents.templates import transcript
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.driver import RunOutcome, execute
from ray_pipeline.graph.results import table_of
from ray_pipeline.graph.stage import Dag
from ray_pipeline.operate.check import before_first_stage, engines_elsewhere
from ray_pipeline.operate.last_lines import use_line
from ray_pipeline.operate.run_settings import executor_of, run_settings
from ray_pipeline.store.locations import beside
from ray_pipeline.store.outside import shown
from ray_pipeline.workflow.training import TrainingConfig

Row = dict[str, Any]

#: Characters of a text that are shown.
_MOST = 2000
#: The last of these that a workflow has is where a preview ends.
_LAST = ("decisions", "verdicts", "candidates")
_TONES = {"desirable": "green", "chosen": "green", "undesirable": "red", "rejected": "red"}


def run_preview(
    config: TrainingConfig, folder: str, count: int, wire: Callable[[Any, str], Dag], executor: str, console: Console
) -> RunOutcome:
    """Run the first prompts up to the decisions.

    Args:
        folder: of the planned run.
        wire: makes the workflow.

    Raises:
        ConfigError: the workflow judges no candidates in this configuration.
        CheckFailed: a check before the first stage found a problem.
    """
    prompts = config.prompts.model_copy(update={"max_prompts": count, "num_shards": 1})
    small, place = config.model_copy(update={"prompts": prompts}), beside(folder, "-preview")
    dag = wire(small, place)
    last = next((s.group_name for role in _LAST for s in dag.stages if s.role_name == role), None)
    if last is None:
        raise ConfigError("no candidates are judged in this configuration, so there is nothing to preview")
    how = run_settings(small, place, calls_root=config.calls_root(folder))
    before = before_first_stage(small, how.session, engines_elsewhere(small, executor))
    return execute(dag, how, executor_of(small, executor), to_group=last, console=console, before=before)


def show(outcome: RunOutcome, currency: str, console: Console) -> None:
    """Print every prompt with its candidates, their scores with reasons, and decisions; then what it cost."""
    rows = {
        role: _by(key, table.to_pylist())
        for role, key in (
            ("prompts", "prompt_id"),
            ("candidates", "prompt_id"),
            ("verdicts", "candidate_id"),
            ("critiques", "candidate_id"),
            ("decisions", "candidate_id"),
        )
        if (table := table_of(outcome.results, role)) is not None
    }
    for number, (prompt, (asked, *_)) in enumerate(rows["prompts"].items(), 1):
        title = f"prompt {number} of {len(rows['prompts'])}, {asked['source']}, {asked['split']}"
        console.print(Rule(Text(shown(title), "bold"), align="left"))
        console.print(_text(transcript(asked["messages"])))
        for candidate in sorted(rows.get("candidates", {}).get(prompt, []), key=lambda row: row["k"]):
            own = {role: found.get(candidate["candidate_id"], []) for role, found in rows.items()}
            console.print(Padding(Group(*_candidate(candidate, own)), (1, 0, 0, 2)))
    usage = sum((result.usage for result in outcome.results.values()), Usage())
    console.print(Rule())
    line = f"{use_line(usage, currency)}; a run with this configuration does not pay for them again"
    console.print(line, highlight=False)


def _candidate(candidate: Row, own: Mapping[str, Sequence[Row]]) -> Iterator[RenderableType]:
    (decision,) = own.get("decisions") or [{}]
    label = decision.get("label", "")
    head = Text(f"candidate {candidate['k']}", "bold")
    head.append(f"  {label}" if label else "", f"bold {_TONES.get(label, 'yellow')}")
    yield head.append(shown(f"  {decision.get('why') or ''}"), "not bold")
    yield _text(candidate["response"] or f"(no response: {candidate['finish_reason']})")
    for verdict in own.get("verdicts", []):
        score = verdict["parse_status"] if verdict["score"] is None else f"{verdict['score']:g}"
        yield _said(f"{verdict['judge']} {score}", verdict["reason"])
    for critique in own.get("critiques", []):
        found = {True: f"flawed ({critique['failure_type']})", False: "sound"}.get(critique["flawed"])
        yield _said(f"critic: {found or critique['parse_status']}", critique["reason"])


def _said(head: str, reason: str | None) -> RenderableType:
    line = Text(shown(head), "cyan")
    return Padding(line.append(f": {_text(reason).plain}" if reason else "", "not bold default"), (0, 0, 0, 2))


def _text(text: str) -> Text:
    """Text of a user or a model: never markup, its control characters visible, cut where it is long."""
    return Text(shown(text if len(text) <= _MOST else f"{text[:_MOST]} … ({len(text)} characters)"))


def _by(key: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        found[row[key]].append(row)
    return dict(found)
