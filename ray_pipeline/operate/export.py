"""The datasets of a run as one folder, ready for the Hugging Face Hub: a card, and one configuration per kind."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_pipeline.data.dataset_rows import SPLITS
from ray_pipeline.graph.results import Run, of_role
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder

#: This file marks a folder as an export, which may be overwritten.
_MARK = "quorum.json"
_KINDS = ("kto", "dpo", "sft")
_SPLIT_NAMES = {"train": "train", "val": "validation"}
_REPO = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")


def export(run: Run, out: Path, kinds: Sequence[str] = (), stage: str = "datasets") -> list[Path]:
    """Write `out/README.md`, `out/KIND/{train,val}/*.parquet`, `out/KIND/README.md` and `out/quorum.json`.

    Args:
        kinds: which datasets; empty: all of the run.
        stage: the stage that wrote them (a comparison has several: `datasets-gated-s0`).

    Returns:
        The files written.

    Raises:
        StoreError: the stage is not done, has no such kind, a file is damaged or foreign, or `out` is not an export.
    """
    if stage not in run.results:
        others = ", ".join(other.name for other in of_role(run.results, "datasets", "branch datasets")) or "none"
        raise StoreError(f"{run.folder.location}: {stage} is not done; finished datasets: {others}")
    result = run.results[stage]
    source = Folder(result.folder)
    present = [kind for kind in _KINDS if kind in source.folders()]
    missing = [kind for kind in kinds if kind not in present]
    if missing:
        raise StoreError(f"{source.location} has no {missing[0]} dataset; it has {', '.join(present)}")
    if out.exists() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise StoreError(f"{out} is not empty and not an earlier export; choose an empty folder")
    target, written = Folder(str(out)), list[Path]()
    rows: dict[str, dict[str, int]] = {}
    for kind in kinds or present:
        rows[kind] = {}
        for split in SPLITS:
            place = source / kind / split
            names = place.names(".parquet")
            rows[kind][split] = sum(
                place.read_table(n, fingerprint=result.fingerprint, kind=kind).num_rows for n in names
            )
            for name in names:
                (target / kind / split).write_bytes(name, place.read_bytes(name))
                written.append(out / kind / split / name)
            for name in (target / kind / split).names(".parquet"):
                if name not in names:  # left from an earlier export; a loader would read it
                    (target / kind / split).delete(name)
        (target / kind).write_bytes("README.md", (source / kind).read_bytes("README.md"))
    cards = {kind: (source / kind).read_bytes("README.md").decode() for kind in rows}
    target.write_bytes("README.md", _card(run, cards, rows).encode())
    target.write_json(_MARK, {**_origin(run, stage), "rows": rows})
    return [*written, out / "README.md", out / _MARK]


def _origin(run: Run, stage: str) -> dict[str, Any]:
    """Where the rows came from, without local paths."""
    return {
        "workflow": run.workflow,
        "run": run.config.get("run", {}).get("name"),
        "stage": stage,
        "fingerprints": {name: result.fingerprint for name, result in run.results.items()},
        "gate": run.config.get("gate"),
        "versions": run.versions,
        "git_revision": run.git_revision,
    }


def _card(run: Run, cards: dict[str, str], rows: dict[str, dict[str, int]]) -> str:
    """README.md: front matter with one configuration per kind, then the texts of the kinds' own cards."""
    parts = {kind: _split_card(card) for kind, card in cards.items()}
    first = next(iter(parts.values()))[0]
    front = {
        "pretty_name": f"Quorum preference data: {run.config.get('run', {}).get('name', 'run')}",
        "license": first.get("license", "other"),
        "task_categories": ["text-generation"],
        "tags": ["quorum", "preference", "rlaif", "trl", *rows],
        "configs": [
            {
                "config_name": kind,
                # `datasets` 5.2 fails on a split without rows, so only those that have some are named.
                "data_files": [
                    {"split": _SPLIT_NAMES[split], "path": f"{kind}/{split}/*.parquet"} for split, n in of.items() if n
                ],
            }
            for kind, of in rows.items()
            if any(of.values())
        ],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        "# Preference data made with Quorum",
        "",
    ]
    lines += ["```python", "from datasets import load_dataset"]
    lines += [f'{kind} = load_dataset("OWNER/NAME", "{kind}")' for kind in rows]
    lines += ["```", ""]
    for _, text in parts.values():
        lines += [_demoted(text), ""]
    return "\n".join(lines)


def _split_card(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text.strip()


def _demoted(text: str) -> str:
    """The text with headings one level down and without the code block, whose path is that of a single dataset."""
    text = re.sub(r"```python\n.*?```\n\n?", "", text, flags=re.S)
    return re.sub(r"^#", "##", text, flags=re.M)


def push(out: Path, repo: str, *, public: bool = False) -> str:
    """Upload an exported folder to the Hub as a dataset; returns its URL.

    Raises:
        StoreError: no token in the environment, an invalid name, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not _REPO.match(repo):
        raise StoreError(f"--push must be OWNER/NAME, not {repo!r}")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise StoreError("--push needs a Hub token; set the environment variable HF_TOKEN (the folder is written)")
    api = HfApi(token=token)
    try:
        api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo, repo_type="dataset", folder_path=str(out), commit_message="Add dataset made with Quorum"
        )
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0].replace(token, "…")
        raise StoreError(f"the Hub refused {repo}: {reason}; the folder {out} is written") from None
    return f"https://huggingface.co/datasets/{repo}"
