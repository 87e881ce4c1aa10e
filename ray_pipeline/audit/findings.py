"""What an audit reads and what it finds: a run's tables, problems by kind, and counts to compare with stats.json."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_pipeline.agents.judges import Rubric
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.programs import ProgramJudge
from ray_pipeline.data.rewards import RewardJudge
from ray_pipeline.data.tokens import Encode
from ray_pipeline.store import keys
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import row_schema
from ray_pipeline.store.tables import JoinedTables, ShardedTable

Row = dict[str, Any]

#: Reasons that only the policy's tokenizer can confirm.
_BY_LENGTH = ("prompt_too_long", "equal_after_truncation")

#: What can be wrong.
PROBLEMS = {
    "unreadable": "a file is missing, truncated or from another run",
    "orphan": "a row's id is not found",
    "duplicate": "a key occurs twice",
    "shard": "a row is in the wrong shard",
    "prompt_id": "a prompt's id is not the hash of its messages",
    "numbers": "mean, variance, penalty or final score do not follow from verdicts and critique",
    "level": "a judge was skipped or asked against `judge.escalate`",
    "program": "a program's verdict is not what its checker finds",
    "posterior": "a posterior does not follow from the verdicts, or the model not from all of them",
    "reward": "a reward model's score does not follow from the rewards of the prompt's candidates",
    "checklist": "a score is not the weighted share of the items that the reply ticks",
    "label": "a label does not follow from the numbers",
    "scores": "a training row carries other scores than the verdicts",
    "weight": "a training row's weight does not follow from the verdicts",
    "messages": "a training row's prompt is not the prompt's messages",
    "completion": "a training row's answer is not the candidate's response",
    "split": "a training row is in another split than its prompt",
    "repeated": "equal answers to a prompt are not one row",
    "pair": "a DPO pair is not the best with the worst, is equal, or should not be there",
    "length": "a training row's prompt is over the limit",
    "missing": "a candidate or prompt has no row, and nothing explains it",
    "count": "stats.json counts other numbers than the tables hold",
}


@dataclasses.dataclass(frozen=True)
class RunTables:
    """Tables of a run, and the settings they were made with.

    Attributes:
        verdicts: one table, or one for each judge stage.
        critiques: None where the gate did not use the critic.
        datasets: location of the datasets stage's folder (kto/, dpo/, stats.json).
        judges: whose scores the gate counted.
        humans: candidate_id → label by people that replaces the gate's.
        programs: the judges that are programs; their verdicts are computed again.
        rewards: the judges that are reward models; their scores are computed again from the rewards.
        ticked: the judges with a checklist; their replies are read again.
        checklists: tables with the items of those whose items were written.
        levels: judges level by level, where only the first are asked about every candidate (`judge.escalate`).
        scale: of the judges' scores, where verdicts may be skipped or rows are weighted.
        threshold: of a certified gate; None where it certified nothing.
        posterior: the model of a gate with a pool; None without one.
    """

    prompts: ShardedTable
    candidates: ShardedTable | JoinedTables
    verdicts: Sequence[ShardedTable]
    critiques: ShardedTable | JoinedTables | None
    decisions: ShardedTable | JoinedTables
    datasets: str
    judges: Sequence[str]
    gate: GateConfig
    config: DatasetsConfig
    humans: Mapping[str, str] = dataclasses.field(default_factory=dict)
    programs: Sequence[ProgramJudge] = ()
    rewards: Sequence[RewardJudge] = ()
    ticked: Sequence[Rubric] = ()
    checklists: Sequence[ShardedTable] = ()
    levels: Sequence[Sequence[str]] = ()
    scale: tuple[int, int] | None = None
    threshold: float | None = None
    posterior: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem: its kind (a key of PROBLEMS), the table and id of the row, and what was found."""

    kind: str
    table: str
    id: str
    message: str


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """Outcome of an audit.

    Attributes:
        rows: rows that were checked, by table.
        found: number of problems of each kind; kinds without problems are left out.
        problems: the first problems, shard by shard.
    """

    rows: dict[str, int]
    found: dict[str, int]
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        return not self.found

    def summary(self) -> str:
        """One line to print."""
        kinds = " and ".join(f"{self.rows[kind]} {kind.upper()}" for kind in ("kto", "dpo", "sft") if kind in self.rows)
        walked = f"{kinds} rows walked back to {self.rows['prompts']} prompts"
        if "source" in self.rows:
            walked += f", compared with {self.rows['source']} rows of the source"
        if self.ok:
            return f"{walked}: no problem"
        return f"{walked}: " + ", ".join(f"{n} × {kind} ({PROBLEMS[kind]})" for kind, n in self.found.items())


class Problems:
    """What is wrong, of which `max_problems` are described and all counted."""

    def __init__(self, max_problems: int) -> None:
        self.max_problems = max_problems
        self.found: collections.Counter[str] = collections.Counter()
        self.problems: list[Problem] = []

    def problem(self, kind: str, table: str, id: str, message: str) -> None:
        assert kind in PROBLEMS
        self.found[kind] += 1
        if len(self.problems) < self.max_problems:
            self.problems.append(Problem(kind, table, id, message))

    def files(
        self, datasets: str, kind: str, split: str, fingerprint: str, weighted: bool = False
    ) -> Iterable[pa.Table]:
        """Training files of one kind and split that can be read."""
        folder, schema = Folder(datasets) / kind / split, row_schema(kind, weighted)
        names = folder.names(".parquet")
        if not names:
            self.problem("unreadable", kind, split, f"{folder.location} holds no Parquet file")
        for name in names:
            try:
                yield folder.read_table(name, fingerprint=fingerprint, kind=kind, schema=schema)
            except StoreError as error:
                self.problem("unreadable", kind, name, str(error))


class Findings(Problems):
    """Problems and counts over all shards."""

    def __init__(self, run: RunTables, encode: Encode | None, max_problems: int) -> None:
        super().__init__(max_problems)
        self.run = run
        self.encode = encode
        self.rules = 1  # see `dataset_rows.RULES`
        self.rows: collections.Counter[str] = collections.Counter(dict.fromkeys((*run.config.kinds, "prompts"), 0))
        #: The audit's own counts of what the datasets stage counted, by kind.
        self.counted: dict[str, collections.Counter[str]] = {k: collections.Counter() for k in ("kto", "dpo", "sft")}

    def training_rows(self, fingerprint: str) -> dict[str, dict[int, list[Row]]]:
        """kind → shard → rows, each with its split folder under "_split"; shard -1 for malformed ids."""
        num_shards = self.run.prompts.num_shards
        found: dict[str, dict[int, list[Row]]] = {}
        for kind in self.run.config.kinds:
            found[kind] = collections.defaultdict(list)
            for split in ("train", "val"):
                for table in self.files(self.run.datasets, kind, split, fingerprint, self.run.config.weights):
                    self.rows[kind] += table.num_rows
                    self.counted[kind][f"rows {split}"] += table.num_rows
                    for row in table.to_pylist():
                        row["_split"] = split
                        found[kind][shard_or_none(row["prompt_id"], num_shards)].append(row)
        return found

    def read(self, table: ShardedTable | JoinedTables, shard: int) -> list[Row]:
        try:
            rows: list[Row] = table.read(shard).to_pylist()
        except (StoreError, FileNotFoundError) as error:
            self.problem("unreadable", table.kind, f"shard {shard}", str(error))
            return []
        self.rows[table.kind] += len(rows)
        return rows

    def check_counts(self, stats: Mapping[str, Any]) -> None:
        """Compare stats.json with the audit's own counts."""
        for kind in self.run.config.kinds:
            if kind not in stats["counts"]:
                self.problem("count", kind, "stats.json", f"stats.json does not count {kind}")
                continue
            own, said = self.counted[kind], stats["counts"][kind]
            pairs = [(f"rows of {s}", stats["rows"][kind][s], own[f"rows {s}"]) for s in ("train", "val")]
            pairs.append(("kept", said["kept"], own["rows train"] + own["rows val"]))
            known = set(said["dropped"]) if self.encode else set(said["dropped"]) - set(_BY_LENGTH)
            pairs += [(reason, said["dropped"][reason], own[reason]) for reason in sorted(known)]
            if not self.encode:
                length = sum(said["dropped"].get(reason, 0) for reason in _BY_LENGTH)
                pairs.append((" + ".join(r for r in _BY_LENGTH if r in said["dropped"]), length, own["unexplained"]))
            for name, value, expected in pairs:
                if value != expected:
                    self.problem("count", kind, name, f"stats.json says {value}, the tables say {expected}")


def row_id(kind: str, row: Row) -> str:
    """A training row as problems name it."""
    return f"{row['chosen_id']} over {row['rejected_id']}" if kind == "dpo" else row["candidate_id"]


def shard_or_none(prompt: str, num_shards: int) -> int:
    """Shard of a prompt id; -1 if the id is malformed."""
    try:
        return keys.shard_of(prompt, num_shards)
    except ValueError:
        return -1
