"""Read a run folder back: what its manifest holds, and the results of its stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.stage import Stage, StageRef, StageResult, StageStop, WholeInput, WholeWork
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder, point_at

if TYPE_CHECKING:
    import pyarrow as pa


#: Role of the stages that decide, in a run in rounds, whether later rounds are made.
DECISION = "decision"


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """A stage as the manifest has it.

    Attributes:
        role, round: what its table is, see `Stage`.
        path: its folder, in the run folder.
        inputs: by role, the names of the stages that it reads.
        status: waiting, done, failed or skipped.
        error: why it failed.
    """

    name: str
    group: str
    role: str
    fingerprint: str
    path: str
    tables: tuple[str, ...]
    inputs: Mapping[str, str]
    status: str
    error: str = ""
    round: int = 0
    rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    usage: Usage = dataclasses.field(default_factory=Usage)

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> StageRecord:
        """From the manifest's entry. Raises KeyError and TypeError when it is something else."""
        optional = {key: entry[key] for key in ("error", "round", "rows", "facts") if key in entry}
        return cls(
            name=name,
            group=entry.get("group", name),
            role=entry["role"] if "role" in entry else _role_before_roles(name, entry),
            fingerprint=entry["fingerprint"],
            path=entry["path"],
            tables=tuple(entry["tables"]),
            inputs=entry.get("inputs", {}),
            status=entry["status"],
            usage=Usage.read(entry.get("usage", {})),
            **optional,
        )

    def result(self, folder: Folder, num_shards: int) -> StageResult:
        """Of a stage that is done."""
        place = folder.uri(self.path)
        ref = StageRef(self.name, self.fingerprint, place, num_shards, self.tables, role=self.role, round=self.round)
        return StageResult(**vars(ref), rows=self.rows, facts=self.facts, usage=self.usage, cached=True)

    @property
    def done(self) -> bool:
        return self.status == "done"


def _role_before_roles(name: str, entry: Mapping[str, Any]) -> str:
    """The role of a stage in a manifest that was written before stages had one; from its group and tables."""
    group, tables = entry.get("group", name), tuple(entry["tables"])
    if not tables:
        by_name = dict.fromkeys(("evaluate", "agreement", "winrate"), "page")
        by_name |= {"benchmarks": "scores", "loop": "loop page"}
        by_group = {"train": "policy", "datasets": "datasets", "improve": "branch datasets"}
        return by_name.get(name) or by_group.get(group, "")
    if group in ("datasets", "improve"):
        return "rows" if group == "datasets" else "branch rows"
    if tables == ("verdicts",) and group in ("evaluate", "improve-judge"):
        return "response verdicts" if group == "evaluate" else "branch verdicts"
    if group.startswith("improve-") and tables != ("revisions",):
        return f"branch {tables[0]}"
    return "turns" if "generate-" in name else tables[0]


@dataclasses.dataclass(frozen=True)
class Run:
    """A stored run, read once.

    Attributes:
        workflow: name of its DAG.
        reference: name or file by which `find_workflow` finds the workflow.
        stages: by name, in the order of the workflow.
        results: of the stages that are done, by name.
        config: every key of its configuration, as plain data; `given` without defaults.
        page: settings of its page.
    """

    folder: Folder
    workflow: str
    reference: str
    stages: Mapping[str, StageRecord]
    results: Mapping[str, StageResult]
    num_shards: int
    calls_root: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    page: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config_digest: str = ""
    versions: Mapping[str, str] | None = None
    git_revision: str | None = None

    @property
    def name(self) -> str:
        """The run's own name, else that of its workflow."""
        return self.page.get("run_name") or self.config.get("run", {}).get("name") or self.workflow

    @property
    def manifest(self) -> str:
        """Location of its manifest, for messages."""
        return self.folder.uri("manifest.json")

    def show(self, view: str, name: str) -> Folder:
        """Point a view at a folder of the run; returns where to look: the view, or without links the folder itself."""
        point_at(self.folder, view, name)
        return self.folder / (view if self.folder.is_local else name)

    def page_folder(self, stage: str) -> str:
        """Name of the folder that the page of a stage is in: its own when it is done, else one of the configuration."""
        return self.stages[stage].path if stage in self.results else f"report-{self.config_digest}"


def stored_stages(run: Run) -> dict[str, Stage]:
    """The stages of a stored run by name, to be read by new ones. Their fingerprints are the manifest's, not computed
    from settings, so that the weights that made them need not be here."""
    stages: dict[str, Stage] = {}
    for name, record in run.stages.items():
        stages[name] = Stage(
            name=name,
            work=WholeWork(_not_again, tables=record.tables),
            config=None,
            inputs={role: stages[parent] for role, parent in record.inputs.items()},
            group=record.group,
            role=record.role,
            round=record.round,
        )
        vars(stages[name])["fingerprint"] = record.fingerprint  # where the cached property keeps it
    return stages


def _not_again(given: WholeInput) -> dict[str, Any]:
    raise StageStop(f"its output in {given.folder.location} is incomplete; use `quorum run` to make it")


def of_role(results: Mapping[str, StageResult], *roles: str) -> list[StageResult]:
    """The results of these roles, ordered by name."""
    return sorted((r for r in results.values() if r.role in roles), key=lambda result: result.name)


def decision(results: Mapping[str, StageResult]) -> StageResult | None:
    """The newest decision of a run in rounds whether it goes on (`evaluate.early_stop`); None where none is made.

    Its facts have the round whose policy is the best so far (`best`), whether later rounds are skipped (`stop`), and
    both in words (`text`).
    """
    return max(of_role(results, DECISION), key=lambda result: result.round, default=None)


def is_skipped(stage: Stage | StageRef, results: Mapping[str, StageResult]) -> bool:
    """Whether a stage is of a round after the one that was decided to be the last."""
    return stage.round > 1 and any(  # the first round is always made, and most runs have no rounds
        stage.round > result.round and result.facts["stop"] for result in of_role(results, DECISION)
    )


def final_round(results: Mapping[str, StageResult]) -> int:
    """The round whose policy is the run's: the best one where that is decided, else the newest that has a policy (1
    without one)."""
    if decided := decision(results):
        return int(decided.facts["best"])
    return max((result.round for result in of_role(results, "policy")), default=1)


def of_final_round(results: Mapping[str, StageResult]) -> dict[str, StageResult]:
    """The results of the final round, and those of all rounds."""
    number = final_round(results)
    return {name: result for name, result in results.items() if result.round in (0, number)}


def table_of(results: Mapping[str, StageResult], *roles: str) -> pa.Table | None:
    """The tables of these roles as one, or None when no such stage is done."""
    tables = [result.table().read_all() for result in of_role(results, *roles)]
    if not tables:
        return None
    import pyarrow as pa

    return pa.concat_tables(tables)


def read_run(location: str) -> Run:
    """Raises StoreError when the folder holds no run, naming it."""
    folder = Folder(location)
    try:
        manifest = folder.read_json("manifest.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{folder.location} holds no run (no manifest.json there); `quorum run` makes one") from error
    try:
        stages = {name: StageRecord.read(name, entry) for name, entry in manifest["stages"].items()}
        return Run(
            folder=folder,
            workflow=manifest["dag"],
            reference=manifest.get("workflow", manifest["dag"]),
            stages=stages,
            results={
                name: stage.result(folder, manifest["num_shards"]) for name, stage in stages.items() if stage.done
            },
            num_shards=manifest["num_shards"],
            calls_root=manifest.get("calls_root", ""),
            config=manifest.get("config", {}),
            given=manifest.get("given", {}),
            page=manifest.get("report", {}),
            config_digest=manifest.get("config_digest", ""),
            versions=manifest.get("versions"),
            git_revision=manifest.get("git_revision"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{folder.uri('manifest.json')} is no manifest ({type(error).__name__}: {error}); rerun the same command "
            "to rewrite it: it finds what is done in the stage folders"
        ) from error
