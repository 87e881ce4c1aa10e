"""The audit: every training row is walked back, by ids, to its decision, verdicts, critique, candidate and prompt.

Nothing of the gate's or the data set stage's arithmetic is used here: means and variances come from the standard
library's exact `statistics`, rules are written out again row by row, so that a mistake in one of the two shows.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_pipeline.data.datasets import DatasetsConfig, Encode
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.store import keys
from ray_pipeline.store.files import Folder, StoreError
from ray_pipeline.store.schemas import READ_STATUSES, TABLES
from ray_pipeline.store.tables import ShardedTable

Row = dict[str, Any]

#: Differences of scores up to this are rounding.
_ROUNDING = 1e-9

#: What can be wrong.
PROBLEMS = {
    "unreadable": "a file is missing, torn or of another run",
    "orphan": "a row's id leads nowhere",
    "duplicate": "a key occurs twice",
    "shard": "a row lies in the wrong shard",
    "prompt_id": "a prompt's id is not the hash of its messages",
    "numbers": "mean, variance, penalty or final score do not follow from verdicts and critique",
    "label": "a label does not follow from the numbers",
    "scores": "a training row carries other scores than the verdicts",
    "messages": "a training row's prompt is not the prompt's messages",
    "completion": "a training row's answer is not the candidate's response",
    "split": "a training row lies in another split than its prompt",
    "pair": "a DPO pair is not the best with the worst, is equal, or should not be there",
    "length": "a training row's prompt is over the limit",
    "missing": "a candidate or prompt has no row, and nothing explains it",
    "count": "stats.json counts other numbers than the tables hold",
}


@dataclasses.dataclass(frozen=True)
class RunTables:
    """What a run wrote, and the settings it was made with.

    Attributes:
        verdicts: one table, or one for each judge stage.
        critiques: None where the gate did not use the critic.
        datasets: location of the data set stage's folder (kto/, dpo/, stats.json).
        judges: whose scores the gate counted.
    """

    prompts: ShardedTable
    candidates: ShardedTable
    verdicts: Sequence[ShardedTable]
    critiques: ShardedTable | None
    decisions: ShardedTable
    datasets: str
    judges: Sequence[str]
    gate: GateConfig
    config: DatasetsConfig


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its kind (a key of PROBLEMS), the table and id of the row, and what was found."""

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
        if self.ok:
            return f"{walked}: no problem"
        return f"{walked}: " + ", ".join(f"{n} × {kind} ({PROBLEMS[kind]})" for kind, n in self.found.items())


def audit_run(run: RunTables, encode: Encode | None = None, max_problems: int = 100) -> AuditReport:
    """Check a finished run, one shard of its tables and the training rows in memory.

    Args:
        encode: token counter of the policy (`datasets.TokenCounter`). With it, each row that was left out for its
            length is measured again; without it, their number is held against the counts in stats.json.
        max_problems: how many problems are described; all are counted.

    Raises:
        StoreError: stats.json of the data set folder is no JSON. (Other unreadable files are problems.)
        FileNotFoundError: the folder has no stats.json: the data set stage has not finished.
    """
    audit = _Audit(run, encode, max_problems)
    stats = Folder(run.datasets).read_json("stats.json")
    training = audit.training_rows(stats["fingerprint"])
    for shard in range(run.prompts.num_shards):
        _Shard(audit, shard, training).check()
    for kind in run.config.kinds:
        for number in range(run.prompts.num_shards):
            training[kind].pop(number, None)
        for rows in training[kind].values():  # what no shard owns
            for row in rows:
                audit.problem("orphan", kind, _row_id(kind, row), f"prompt id {row['prompt_id']!r} belongs to no shard")
    audit.check_counts(stats)
    return AuditReport(dict(audit.rows), dict(audit.found), audit.problems)


class _Audit:
    """Problems and counts over all shards."""

    def __init__(self, run: RunTables, encode: Encode | None, max_problems: int) -> None:
        self.run = run
        self.encode = encode
        self.max_problems = max_problems
        self.rows: collections.Counter[str] = collections.Counter(dict.fromkeys((*run.config.kinds, "prompts"), 0))
        self.found: collections.Counter[str] = collections.Counter()
        self.problems: list[Problem] = []
        #: Own counts of what the data set stage counted, by kind.
        self.counted: dict[str, collections.Counter[str]] = {k: collections.Counter() for k in ("kto", "dpo", "sft")}

    def problem(self, kind: str, table: str, id: str, message: str) -> None:
        assert kind in PROBLEMS
        self.found[kind] += 1
        if len(self.problems) < self.max_problems:
            self.problems.append(Problem(kind, table, id, message))

    def training_rows(self, fingerprint: str) -> dict[str, dict[int, list[Row]]]:
        """kind → shard → rows, each with its split folder under "_split"; shard -1 for ids that are none."""
        num_shards = self.run.prompts.num_shards
        found: dict[str, dict[int, list[Row]]] = {}
        for kind in self.run.config.kinds:
            found[kind] = collections.defaultdict(list)
            for split in ("train", "val"):
                for table in self._files(kind, split, fingerprint):
                    self.rows[kind] += table.num_rows
                    self.counted[kind][f"rows {split}"] += table.num_rows
                    for row in table.to_pylist():
                        row["_split"] = split
                        found[kind][_shard_of(row["prompt_id"], num_shards)].append(row)
        return found

    def _files(self, kind: str, split: str, fingerprint: str) -> Iterable[pa.Table]:
        folder = Folder(self.run.datasets) / kind / split
        names = folder.names(".parquet")
        if not names:
            self.problem("unreadable", kind, split, f"{folder.location} holds no Parquet file")
        for name in names:
            try:
                yield folder.read_table(name, fingerprint=fingerprint, kind=kind, schema=TABLES[kind])
            except StoreError as error:
                self.problem("unreadable", kind, name, str(error))

    def read(self, table: ShardedTable, shard: int) -> list[Row]:
        try:
            rows: list[Row] = table.read(shard).to_pylist()
        except (StoreError, FileNotFoundError) as error:
            self.problem("unreadable", table.kind, f"shard {shard}", str(error))
            return []
        self.rows[table.kind] += len(rows)
        return rows

    def check_counts(self, stats: Mapping[str, Any]) -> None:
        """Hold stats.json against what was counted on the way."""
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


#: Reasons that only the policy's tokenizer can confirm.
_BY_LENGTH = ("prompt_too_long", "equal_after_truncation")


class _Shard:
    """One shard: all its rows by key, and the checks on them."""

    def __init__(self, audit: _Audit, shard: int, training: Mapping[str, Mapping[int, list[Row]]]) -> None:
        self.audit, self.run, self.number = audit, audit.run, shard
        run = audit.run
        self.prompts = self._index("prompts", audit.read(run.prompts, shard), "prompt_id")
        self.candidates = self._index("candidates", audit.read(run.candidates, shard), "candidate_id")
        verdicts = [row for table in run.verdicts for row in audit.read(table, shard)]
        self.verdicts = self._index("verdicts", verdicts, "candidate_id", "judge")
        critiques = audit.read(run.critiques, shard) if run.critiques and run.gate.use_critic else []
        self.critiques = self._index("critiques", critiques, "candidate_id")
        self.decisions = self._index("decisions", audit.read(run.decisions, shard), "candidate_id")
        self.training = {kind: training[kind].get(shard, []) for kind in run.config.kinds}

    def check(self) -> None:
        for prompt in self.prompts.values():
            self._check_prompt(prompt)
        self._check_links()
        for candidate in self.candidates.values():
            self._check_decision(candidate)
        if "kto" in self.training:
            self._check_kto(self.training["kto"])
        if "dpo" in self.training:
            self._check_dpo(self.training["dpo"])
        if "sft" in self.training:
            self._check_sft(self.training["sft"])

    # --- tables of the run ---

    def _index(self, table: str, rows: Iterable[Row], *key: str) -> dict[Any, Row]:
        """Rows by key (a tuple where it has several columns); reports repeated keys and strays of other shards."""
        found: dict[Any, Row] = {}
        for row in rows:
            name = tuple(row[k] for k in key) if len(key) > 1 else row[key[0]]
            text = " by ".join(row[k] for k in key)
            if name in found:
                self.audit.problem("duplicate", table, text, "the key occurs twice in the table")
                continue
            found[name] = row
            home = _shard_of(row["prompt_id"], self.run.prompts.num_shards)
            if home != self.number:
                where = "no shard" if home < 0 else f"shard {home}"
                self.audit.problem(
                    "shard", table, text, f"prompt {row['prompt_id']!r} belongs to {where}, the row is in {self.number}"
                )
        return found

    def _check_prompt(self, prompt: Row) -> None:
        expected = keys.prompt_id(prompt["messages"])
        if expected != prompt["prompt_id"]:
            self.audit.problem("prompt_id", "prompts", prompt["prompt_id"], f"its messages hash to {expected}")

    def _check_links(self) -> None:
        """Every row belongs to a candidate, and every candidate to a prompt; both name the same prompt."""
        for candidate in self.candidates.values():
            if candidate["prompt_id"] not in self.prompts:
                self._orphan("candidates", candidate, f"prompt {candidate['prompt_id']!r} is not in prompts")
        for table, rows in (("verdicts", self.verdicts), ("critiques", self.critiques), ("decisions", self.decisions)):
            for row in rows.values():
                owner = self.candidates.get(row["candidate_id"])
                if owner is None:
                    self._orphan(table, row, "its candidate is not in candidates")
                elif owner["prompt_id"] != row["prompt_id"]:
                    self._orphan(table, row, f"names prompt {row['prompt_id']!r}, its candidate {owner['prompt_id']!r}")

    def _orphan(self, table: str, row: Row, message: str) -> None:
        self.audit.problem("orphan", table, row["candidate_id"], message)

    def _check_decision(self, candidate: Row) -> None:
        """Numbers and label of the decision, from the formulas of the method (docs/architecture.md)."""
        name = candidate["candidate_id"]
        decision = self.decisions.get(name)
        if decision is None:
            self.audit.problem("missing", "decisions", name, "the candidate has no decision")
            return
        scores = [_read_score(self.verdicts.get((name, judge)), "score") for judge in self.run.judges]
        flawed = _read_score(self.critiques.get(name), "flawed") if self.run.gate.use_critic else False
        for column, expected in _numbers(scores, flawed, self.run.gate).items():
            if not _close(decision[column], expected):
                message = f"{column} is {decision[column]}, should be {expected}"
                self.audit.problem("numbers", "decisions", name, message)
        # The label is asked of the stored numbers: a threshold that rounding misses by 1e-16 is no problem.
        label = _label(None not in scores, flawed is not None, decision, self.run.gate)
        if decision["label"] != label:
            self.audit.problem("label", "decisions", name, f"label is {decision['label']!r}, should be {label!r}")

    # --- training rows ---

    def _check_kto(self, rows: list[Row]) -> None:
        report = self.audit.problem
        present: set[str] = set()
        for row in rows:
            name = row["candidate_id"]
            if name in present:
                report("duplicate", "kto", name, "the candidate occurs twice")
                continue
            present.add(name)
            owner = self._owner("kto", name, row, name)
            if owner is None:
                continue
            candidate, decision, _ = owner
            self._check_answer("kto", name, "completion", row["completion"], candidate)
            if decision["label"] != ("desirable" if row["label"] else "undesirable"):
                report("label", "kto", name, f"label is {row['label']}, but the decision is {decision['label']!r}")
            if not _close(row["final_score"], decision["final_score"]):
                report("scores", "kto", name, f"final_score {row['final_score']}, decided {decision['final_score']}")
            expected = [(j, _read_score(self.verdicts.get((name, j)), "score")) for j in self.run.judges]
            if sorted((s["judge"], s["score"]) for s in row["scores"]) != sorted(expected):
                report("scores", "kto", name, f"scores {row['scores']}, but the verdicts are {expected}")
            if _is_empty(candidate["response"]):
                report("completion", "kto", name, "the response is empty and should have been left out")
            if self._too_long(row["prompt_id"]):
                report("length", "kto", name, "the prompt is over max_prompt_length and should have been left out")
        self._check_kto_is_complete(present)

    def _check_kto_is_complete(self, present: set[str]) -> None:
        counted = self.audit.counted["kto"]
        absent: dict[str, list[str]] = collections.defaultdict(list)
        for name, decision in self.decisions.items():
            if decision["label"] not in ("desirable", "undesirable") or name not in self.candidates:
                continue
            if _is_empty(self.candidates[name]["response"]):
                counted["empty_response"] += 1
            elif name not in present:
                absent[decision["prompt_id"]].append(name)
        used = {self.candidates[name]["prompt_id"] for name in present if name in self.candidates}
        for prompt, names in absent.items():
            # A prompt that is too long drops all of its candidates, so one that is used cannot be the reason.
            if prompt in used or (self.audit.encode and not self._too_long(prompt)):
                for name in names:
                    self.audit.problem("missing", "kto", name, "the candidate has a label but no row, without a reason")
            counted["prompt_too_long" if self.audit.encode else "unexplained"] += len(names)

    def _check_sft(self, rows: list[Row]) -> None:
        """Each row is the best desirable answer of its prompt; where pairs were written, the chosen one of its pair."""
        report = self.audit.problem
        chosen = {row["chosen_id"] for row in self.training.get("dpo", [])}
        present: set[str] = set()
        for row in rows:
            name = row["candidate_id"]
            if name in present:
                report("duplicate", "sft", name, "the candidate occurs twice")
                continue
            present.add(name)
            owner = self._owner("sft", name, row, name)
            if owner is None:
                continue
            candidate, decision, _ = owner
            self._check_answer("sft", name, "completion", row["completion"], candidate)
            if decision["label"] != "desirable":
                report("label", "sft", name, f"an answer to imitate, but the decision is {decision['label']!r}")
            if not _close(row["final_score"], decision["final_score"]):
                report("scores", "sft", name, f"final_score {row['final_score']}, decided {decision['final_score']}")
            if "dpo" in self.training and name not in chosen:
                report("pair", "sft", name, "no pair has chosen it")
        for name in chosen - present:
            report("missing", "sft", name, "a pair has chosen it, but it has no row")

    def _check_dpo(self, rows: list[Row]) -> None:
        report = self.audit.problem
        by_prompt: dict[str, Row] = {}
        for row in rows:
            name = _row_id("dpo", row)
            if row["prompt_id"] in by_prompt:
                report("duplicate", "dpo", name, f"prompt {row['prompt_id']} has two pairs")
                continue
            by_prompt[row["prompt_id"]] = row
            for side in ("chosen", "rejected"):
                owner = self._owner("dpo", row[f"{side}_id"], row, name)
                if owner is None:
                    continue
                candidate, decision, _ = owner
                self._check_answer("dpo", name, side, row[side], candidate)
                if not _close(row[f"{side}_score"], decision["final_score"]):
                    report("scores", "dpo", name, f"{side}_score is not the decision's {decision['final_score']}")
            if not _close(row["score_gap"], row["chosen_score"] - row["rejected_score"]):
                report("scores", "dpo", name, f"score_gap {row['score_gap']} is not chosen_score - rejected_score")
        self._check_pairs(by_prompt)

    def _check_pairs(self, by_prompt: Mapping[str, Row]) -> None:
        """Each prompt has the pair that it should have, or none for a reason."""
        counted = self.audit.counted["dpo"]
        members: dict[str, list[Row]] = {}
        for name, decision in self.decisions.items():
            if name in self.candidates:
                members.setdefault(decision["prompt_id"], [])
                if not _is_empty(self.candidates[name]["response"]):
                    members[decision["prompt_id"]].append(decision)
        for prompt, decisions in members.items():
            reason, pair = self._expected_pair(prompt, decisions)
            row = by_prompt.get(prompt)
            if row is None:
                if reason is None and self.audit.encode:
                    self.audit.problem("missing", "dpo", prompt, f"the prompt has no pair, but should have {pair}")
                counted[reason or "unexplained"] += 1
            elif reason is not None:
                self.audit.problem("pair", "dpo", _row_id("dpo", row), f"the pair should have been left out: {reason}")
            elif (row["chosen_id"], row["rejected_id"]) != pair:
                self.audit.problem("pair", "dpo", _row_id("dpo", row), f"the pair should be {pair[0]}, {pair[1]}")

    def _expected_pair(self, prompt: str, decisions: list[Row]) -> tuple[str | None, tuple[str, str]]:
        """Why there is no pair (None if there is one, as far as can be told), and its ids."""
        best = worst = None
        for d in sorted(decisions, key=lambda d: d["candidate_id"]):
            if d["final_score"] is None:
                continue  # reported with its label
            if d["label"] == "desirable" and (best is None or d["final_score"] > best["final_score"]):
                best = d
            if d["label"] == "undesirable" and (worst is None or d["final_score"] < worst["final_score"]):
                worst = d
        if best is None or worst is None:
            if best is worst:
                return "no_desirable_or_undesirable", ("", "")
            return ("no_desirable" if best is None else "no_undesirable"), ("", "")
        pair = (best["candidate_id"], worst["candidate_id"])
        if best["final_score"] - worst["final_score"] < self.run.config.min_gap:
            return "gap_too_small", pair
        texts = [self.candidates[name]["response"] for name in pair]
        if keys.normalise_text(texts[0]) == keys.normalise_text(texts[1]):
            return "equal_text", pair
        if self._too_long(prompt):
            return "prompt_too_long", pair
        if self.audit.encode and prompt in self.prompts:
            messages = self.prompts[prompt]["messages"]
            ids = [self.audit.encode(messages, [{"role": "assistant", "content": text}]) for text in texts]
            if ids[0][: self.run.config.max_length] == ids[1][: self.run.config.max_length]:
                return "equal_after_truncation", pair
        return None, pair

    def _owner(self, table: str, candidate_id: str, row: Row, name: str) -> tuple[Row, Row, Row] | None:
        """Candidate, decision and prompt of a training row; reports what is not there, and the prompt's own checks."""
        candidate, decision = self.candidates.get(candidate_id), self.decisions.get(candidate_id)
        prompt = self.prompts.get(row["prompt_id"])
        for where, found in (("candidates", candidate), ("decisions", decision), ("prompts", prompt)):
            if found is None:
                self.audit.problem("orphan", table, name, f"its {where[:-1]} is not in {where}")
        if candidate is None or decision is None or prompt is None:
            return None
        if candidate["prompt_id"] != row["prompt_id"]:
            self.audit.problem("orphan", table, name, f"{candidate_id} is an answer to {candidate['prompt_id']}")
            return None
        if row["prompt"] != prompt["messages"]:
            self.audit.problem("messages", table, name, "its prompt is not the messages of the prompt")
        if not row["split"] == row["_split"] == prompt["split"]:
            self.audit.problem(
                "split", table, name, f"in {row['_split']}, marked {row['split']}, but the prompt is {prompt['split']}"
            )
        return candidate, decision, prompt

    def _check_answer(self, table: str, name: str, column: str, messages: list[Row], candidate: Row) -> None:
        if messages != [{"role": "assistant", "content": candidate["response"]}]:
            self.audit.problem("completion", table, name, f"{column} is not the response of its candidate")

    def _too_long(self, prompt: str) -> bool:
        if self.audit.encode is None or prompt not in self.prompts:
            return False
        return len(self.audit.encode(self.prompts[prompt]["messages"], None)) > self.run.config.max_prompt_length


# --- the formulas, once more ------------------------------------------------------------------------------------------


def _read_score(row: Row | None, column: str) -> Any:
    """The value of a verdict or critique, or None when there is none that was read."""
    if row is None or row["parse_status"] not in READ_STATUSES:
        return None
    value = row[column]
    return None if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def _numbers(scores: Sequence[float | None], flawed: bool | None, gate: GateConfig) -> dict[str, float | None]:
    known = [score for score in scores if score is not None]
    whole = len(known) == len(scores)
    mean = statistics.mean(known) if whole else None
    variance = (statistics.variance(known) if len(known) > 1 else 0.0) if whole else None
    penalty = None if flawed is None else gate.alpha * flawed
    final = None if mean is None or penalty is None else mean * (1 - penalty)
    return {"mean_score": mean, "score_variance": variance, "penalty": penalty, "final_score": final}


def _label(scores_read: bool, critique_read: bool, decision: Row, gate: GateConfig) -> str:
    if not scores_read:
        return "incomplete"
    if gate.use_variance and (decision["score_variance"] or 0) > gate.tau:
        return "abstain"
    if not critique_read or decision["final_score"] is None:
        return "incomplete"
    if decision["final_score"] >= gate.desirable_at:
        return "desirable"
    return "undesirable" if decision["final_score"] <= gate.undesirable_at else "discard"


def _close(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return abs(found - expected) <= _ROUNDING


def _is_empty(response: str | None) -> bool:
    return not (response or "").strip()


def _shard_of(prompt: str, num_shards: int) -> int:
    """Shard of a prompt id, -1 where it is none."""
    try:
        return keys.shard_of(prompt, num_shards)
    except ValueError:
        return -1


def _row_id(kind: str, row: Row) -> str:
    return f"{row['chosen_id']} over {row['rejected_id']}" if kind == "dpo" else row["candidate_id"]
