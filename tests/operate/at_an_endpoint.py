"""A small DMAPO configuration whose models are at one endpoint on loopback, and `quorum` in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from ray_pipeline.cli import app
from tests.endpoint import Answer, said

RUBRICS = [{"name": "helpfulness", "text": "Does it help?"}, {"name": "factuality", "text": "Is it true?"}]
COUNT, K = 12, 2


def reply(body: dict[str, Any], number: int) -> Answer:
    """A reply in the form that the request asks for."""
    if "response_format" not in body:
        return said("An answer.")
    fields = body["response_format"]["json_schema"]["schema"]["properties"]
    kinds = {"string": "because", "boolean": False, "integer": 8}
    return said(json.dumps({name: field.get("enum", [kinds.get(field["type"])])[-1] for name, field in fields.items()}))


def config(url: str = "http://127.0.0.1:9/v1", **changes: Any) -> dict[str, Any]:
    prices = {"input": 1000.0, "output": 1000.0}
    endpoint = {"base_url": url, "api_key_env": "LOOPBACK_KEY", "prices": prices, "patience_s": 1.0, "retries": 1}
    values = {
        "models": {
            "policy": {"model": "pocket:policy", "dtype": "float32"},
            "writer": {"engine": "openai", "model": "writer", "endpoint": endpoint},
            "judge": {"engine": "openai", "model": "judge", "endpoint": endpoint},
        },
        "prompts": {"sources": [{"type": "pocket", "count": COUNT, "seed": 0}], "num_shards": 2},
        "candidates": {"model": "writer", "k": K},
        "judge": {"rubrics": RUBRICS},
        "train": {"dtype": "float32"},
    }
    return {**values, **changes}


def quorum(*arguments: str, code: int = 0) -> str:
    ended = CliRunner().invoke(app, list(arguments))
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    assert ended.exit_code == code, ended.output
    return ended.output


def command(name: str, tmp_path: Path, values: dict[str, Any], *arguments: str) -> list[str]:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return [name, "dmapo", "-c", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run"), *arguments]
