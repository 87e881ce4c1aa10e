"""Datasets and policy of a run as one folder for the Hugging Face Hub: cards, and one configuration per kind."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.data.card import PIPELINE, Provenance, pipeline_text, write_card
from ray_pipeline.data.dataset_rows import SPLITS
from ray_pipeline.graph.results import Run, of_role
from ray_pipeline.operate.export_policy import export_policy
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import row_schema

#: This file marks a folder as an export, which may be overwritten.
_MARK = "quorum.json"
_KINDS = ("kto", "dpo", "sft")
_REPO = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")


def export(
    run: Run, out: Path, kinds: Sequence[str] = (), stage: str = "datasets", *, policy: str = "", datasets: bool = True
) -> list[Path]:
    """Write one folder: `README.md`, `KIND/{train,val}/*.parquet`, `policy/{adapter,merged}/`, `pipeline.yaml` and
    `quorum.json`.

    Args:
        kinds: which datasets; empty: all of the run.
        stage: the stage that wrote them (a comparison has several: `datasets-gated-s0`).
        policy: the stage that trained the policy; "": none is written.
        datasets: whether the datasets are written.

    Returns:
        The files written; of a policy, its cards.

    Raises:
        StoreError: a stage is not done, has no such kind, a file is damaged or foreign, or `out` is not an export.
    """
    if out.exists() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise StoreError(f"{out} is not empty and not an earlier export; choose an empty folder")
    target, stamp, written = Folder(str(out)), _stamp(run), list[Path]()
    if datasets:
        rows = _datasets(run, target, kinds, stage)
        stamp |= {"stage": stage, "rows": rows}
        written += [file for kind in rows for file in sorted((out / kind).rglob("*.parquet"))] + [out / "README.md"]
    if policy:
        written += export_policy(run, out / "policy", policy)
        stamp["policy"] = policy
    if run.given:
        target.write_bytes(PIPELINE, pipeline_text(run.given).encode())
        written.append(out / PIPELINE)
    target.write_json(_MARK, stamp)
    return [*written, out / _MARK]


def _datasets(run: Run, target: Folder, kinds: Sequence[str], stage: str) -> dict[str, dict[str, int]]:
    """Copy the files and write their card; returns the rows of each split."""
    if stage not in run.results:
        others = ", ".join(other.name for other in of_role(run.results, "datasets", "branch datasets")) or "none"
        raise StoreError(f"{run.folder.location}: {stage} is not done; finished datasets: {others}")
    result = run.results[stage]
    source = Folder(result.folder)
    present = [kind for kind in _KINDS if kind in source.folders()]
    missing = [kind for kind in kinds if kind not in present]
    if missing:
        raise StoreError(f"{source.location} has no {missing[0]} dataset; it has {', '.join(present)}")
    stats = source.read_json("stats.json")
    weighted = stats["settings"].get("weights", False)
    rows: dict[str, dict[str, int]] = {}
    for kind in kinds or present:
        rows[kind], schema = {}, row_schema(kind, weighted)
        for split in SPLITS:
            place, copy = source / kind / split, target / kind / split
            names = place.names(".parquet")
            rows[kind][split] = 0
            for name in names:
                table = place.read_table(name, fingerprint=result.fingerprint, kind=kind, schema=schema)
                rows[kind][split] += table.num_rows
                copy.write_table(name, table, fingerprint=result.fingerprint, kind=kind)
            for name in copy.names(".parquet"):
                if name not in names:  # left from an earlier export; a loader would read it
                    copy.delete(name)
    write_card(target, stats, _provenance(run, source, stats), list(rows))
    return rows


def _stamp(run: Run) -> dict[str, Any]:
    """Where the files came from, without local paths."""
    return {
        "workflow": run.workflow,
        "run": run.config.get("run", {}).get("name"),
        "fingerprints": {name: result.fingerprint for name, result in run.results.items()},
        "gate": run.config.get("gate"),
        "versions": run.versions,
        "git_revision": run.git_revision,
    }


def _provenance(run: Run, source: Folder, stats: Mapping[str, Any]) -> Provenance:
    if "origin" in stats:
        return Provenance(**stats["origin"], config=run.config, given=run.given)
    # Files of an earlier version: the first sentence of a kind's card is all that was kept.
    old = [(source / kind).read_bytes("README.md").decode() for kind in stats["rows"]]
    found = re.search(r"^(.*), ready for TRL's", old[0], re.MULTILINE)
    return Provenance(found[1] if found else "", config=run.config, given=run.given)


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
