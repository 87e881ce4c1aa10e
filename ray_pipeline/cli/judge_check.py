"""`quorum judge-check`: the workflow `judge_check` for one model, without a file."""

from __future__ import annotations

import json
import os
import re
from typing import Annotated

import typer

from ray_pipeline.cli.run import run
from ray_pipeline.cli.terminal import OverridesArgument, RunDirOption, refused


def judge_check(
    model: Annotated[
        str | None,
        typer.Argument(help="folder, Hub name, smol:135m-instruct, or with --endpoint the name that the server knows"),
    ] = None,
    overrides: OverridesArgument = None,
    endpoint: Annotated[
        str | None, typer.Option(help="base URL of an OpenAI-compatible server (https://api.openai.com/v1)")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="environment variable with the server's key; default: no key")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="public set, as NAME (read from the Hub) or NAME=PATH: judgebench, llmbar, reward_bench_2, mt_bench, "
            "pandalm, fair_eval; may be given several times",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="YAML file of `quorum run judge_check`; default: judge_check")
    ] = None,
    run_dir: RunDirOption = None,
    max_cost: Annotated[float | None, typer.Option(help="as of `quorum run`")] = None,
    dry_run: Annotated[bool, typer.Option(help="as of `quorum run`")] = False,
    executor: Annotated[str, typer.Option(help="as of `quorum run`")] = "ray",
) -> None:
    """Measure a judge before you pay for it: a card with its accuracy, biases, unread replies, time and cost.

    The judge compares answers of which the better one is known, in both orders: public sets, each counted by its own
    rule, and built-in pairs, plain and dressed to mislead it (order, length, verbosity, self_family, injection,
    format). The card is RUN/report/report.html, with report.md and judge_card.json. It is a run like any other: rerun
    the command to resume it (no call is made twice); `quorum plan judge_check`, `status` and `report` work on it.

    A configuration names the card at the judge's model. Its report then shows it, and no run starts with a judge below
    the floor:

    \b
      models:
        judge:
          model: Qwen/Qwen3-8B
          card: {path: runs/judge-check-Qwen3-8B, floor: {judgebench: 0.6, order: 0.8, read: 0.98}}

    Examples:

    \b
      quorum judge-check smol:135m-instruct
      quorum judge-check Qwen/Qwen3-8B --set judgebench --set llmbar=LLMBar/Dataset/LLMBar
      quorum judge-check gpt-4o-mini --endpoint https://api.openai.com/v1 --api-key-env OPENAI_API_KEY --max-cost 2
      quorum judge-check -c pocket_judge_check
    """
    if model is not None and re.match(r"[a-z_]+(\.\w+)*=", model):
        overrides = [model, *(overrides or [])]  # a key of the configuration, without a model before it
        model = None
    with refused():
        changes = _changes(model, endpoint, api_key_env, sets, config)
    run(
        "judge_check",
        [*changes, *(overrides or [])],
        config=config or "judge_check",
        run_dir=run_dir,
        max_cost=max_cost,
        dry_run=dry_run,
        executor=executor,
    )


def _changes(
    model: str | None, endpoint: str | None, api_key_env: str | None, sets: list[str] | None, config: str | None
) -> list[str]:
    """The options as overrides of the configuration."""
    changes: dict[str, object] = {}
    if model is not None:
        block: dict[str, object] = {"model": model}
        if endpoint is not None:
            block |= {"engine": "openai", "endpoint": {"base_url": endpoint, "api_key_env": api_key_env}}
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(model.rstrip("/")))
        changes = {"models": {"judge": block}, "run.name": f"judge-check-{name}"}
    elif config is None:
        raise ValueError("name the model of the judge, or a configuration with -c")
    if model is None and endpoint is not None:
        raise ValueError("--endpoint serves a model; name it before the options")
    if endpoint is None and api_key_env is not None:
        raise ValueError("--api-key-env belongs to --endpoint; pass both")
    if sets:
        pairs = [one.partition("=") for one in sets]
        changes["sets"] = [{"type": name, **({"path": path} if sign else {})} for name, sign, path in pairs]
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]
