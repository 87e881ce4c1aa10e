"""The audit of a feedback loop's datasets: every row is traced back to its pick, verdicts, response and prompt.

As in `audit`, nothing of the selection's arithmetic is used here: the jury's scores and the pick are written out
again, row by row.
"""

from __future__ import annotations

import collections
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_pipeline.agents.jurors import JuryRule
from ray_pipeline.audit.findings import AuditReport, Problem, row_id
from ray_pipeline.audit.formulas import is_skipped
from ray_pipeline.audit.posterior import in_slice
from ray_pipeline.data.escalation import Levels
from ray_pipeline.data.gate import Cut
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import normalise_text
from ray_pipeline.store.schemas import READ_STATUSES
from ray_pipeline.store.tables import JoinedTables, ShardedTable

Row = dict[str, Any]


def audit_loop(
    prompts: ShardedTable,
    candidates: ShardedTable | JoinedTables,
    verdicts: Sequence[ShardedTable],
    decisions: ShardedTable | JoinedTables,
    datasets: str,
    judges: Sequence[str],
    min_gap: float,
    rule: JuryRule,
    cut: Cut = "exclude",
    every_rejected: bool = True,
    levels: Levels = (),
    max_problems: int = 100,
) -> AuditReport:
    """Check a finished datasets stage, one shard of its tables and the training rows in memory.

    Args:
        datasets: location of the stage's folder (kto/, dpo/, stats.json).
        judges: whose scores pick the best.
        rule: how their scores become one.
        cut: rule for responses whose text is not whole.
        every_rejected: the pick makes a pair with each rejected text, not with the worst response alone.
        levels: the judges by level (`select.escalate`); none: all were asked about every prompt.
        max_problems: how many problems are described; all are counted.

    Raises:
        StoreError: a file is missing or from another run, or stats.json is not valid JSON.
        FileNotFoundError: the folder has no stats.json: the stage has not finished.
    """
    folder = Folder(datasets)
    stats = folder.read_json("stats.json", set_aside=True)
    rules = stats.get("rules", 1)
    if rules < 2:  # of a version without a rule
        cut = "keep"
    rows: dict[str, int] = {"prompts": 0, "candidates": 0}
    training: dict[str, dict[str, list[Row]]] = {}
    for kind in stats["rows"]:
        training[kind] = collections.defaultdict(list)
        for row in _training_rows(folder, kind, stats["fingerprint"]):
            training[kind][row["prompt_id"]].append(row)
            rows[kind] = rows.get(kind, 0) + 1
    problems: list[Problem] = []
    for shard in range(prompts.num_shards):
        asked = prompts.read(shard).to_pylist()
        answers = _by_prompt(candidates.read(shard).to_pylist())
        said = _by_prompt(row for table in verdicts for row in table.read(shard).to_pylist())
        decided = _by_prompt(decisions.read(shard).to_pylist())
        rows["prompts"] += len(asked)
        for prompt in asked:
            name = prompt["prompt_id"]
            rows["candidates"] += len(answers[name])
            own = {kind: of.pop(name, []) for kind, of in training.items()}
            loop = _Loop(prompt, answers[name], said[name], decided[name], levels or (judges,), min_gap, rule, cut)
            problems += [*loop.check(own), *loop.check_copies(own, rules, every_rejected)]
    for kind, of in training.items():
        problems += [Problem("orphan", kind, name, "no such prompt in the run") for name in of]
    for kind, found in stats["rows"].items():
        if found["train"] + found["val"] != rows.get(kind, 0):
            message = f"stats.json counts {found['train'] + found['val']} rows, the files hold {rows.get(kind, 0)}"
            problems.append(Problem("count", kind, kind, message))
    kinds = collections.Counter(problem.kind for problem in problems)
    return AuditReport(rows, dict(kinds), problems[:max_problems])


def _training_rows(folder: Folder, kind: str, fingerprint: str) -> Iterator[Row]:
    for split in ("train", "val"):
        part = folder / kind / split
        for name in part.names(".parquet"):
            for row in part.read_table(name, fingerprint=fingerprint).to_pylist():
                yield {**row, "file_split": split}


def _by_prompt(rows: Any) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        found[row["prompt_id"]].append(row)
    return found


def _pooled(by: Mapping[str, float], rule: JuryRule) -> float:
    """One answer's score, from its scores by judge."""
    if rule.pool == "median":
        return statistics.median(by.values())
    weights = rule.weights or dict.fromkeys(by, 1.0)
    return sum(weights[judge] * score for judge, score in by.items()) / sum(weights[judge] for judge in by)


def _votes(read: Mapping[str, Mapping[str, float]], rule: JuryRule) -> dict[str, float]:
    """1 for the answers that most judges hold best, 0 for the others."""
    support: dict[frozenset[str], float] = collections.defaultdict(float)
    for judge in next(iter(read.values()), {}):
        top = max(by[judge] for by in read.values())
        held = frozenset(name for name, by in read.items() if by[judge] >= top - 1e-9)
        support[held] += rule.weights[judge] if rule.weights else 1.0
    most = max(support.values(), default=0.0)
    best = {name for held, weight in support.items() if weight >= most - 1e-9 for name in held}
    return {name: float(name in best) for name in read}


class _Loop:
    """One prompt with all that was made of it."""

    def __init__(
        self,
        prompt: Row,
        answers: Sequence[Row],
        verdicts: Sequence[Row],
        decisions: Sequence[Row],
        levels: Sequence[Sequence[str]],
        min_gap: float,
        rule: JuryRule,
        cut: Cut,
    ) -> None:
        self.prompt, self.min_gap, self.decisions = prompt, min_gap, decisions
        self.levels, self.verdicts = levels, verdicts
        self.answers = {row["candidate_id"]: row for row in answers}
        self.twice = len(answers) - len(self.answers)
        by_judge: dict[str, dict[str, float]] = collections.defaultdict(dict)
        for row in verdicts:
            if row["parse_status"] in READ_STATUSES and row["score"] is not None:
                by_judge[row["candidate_id"]][row["judge"]] = row["score"]
        ended = ("stop", "refusal", "unknown", "too_long", "error")
        self.cut = {n for n, row in self.answers.items() if cut != "keep" and row["finish_reason"] not in ended}
        self.barred = self.cut if cut == "exclude" else set()
        self.texts = {name: normalise_text(row["response"] or "") for name, row in self.answers.items()}
        self.asked = list(levels[0])
        for level in levels[1:]:
            if not in_slice(prompt["prompt_id"]) and not self._is_open(self._read_by(by_judge, self.asked)):
                break
            self.asked += level
        read = self._read_by(by_judge, self.asked)
        if rule.pool != "mean":  # the mean is shown of responses that are left out, too
            read = {name: by for name, by in read.items() if name not in self.barred}
        self.scores = _votes(read, rule) if rule.votes else {name: _pooled(by, rule) for name, by in read.items()}
        self.labels = self._labels()

    def _read_by(
        self, by_judge: Mapping[str, Mapping[str, float]], judges: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Scores by judge of the responses that all of these judges could score."""
        whole = {name: by for name, by in by_judge.items() if by.keys() >= set(judges) and name in self.answers}
        return {name: {judge: by[judge] for judge in judges} for name, by in whole.items()}

    def _is_open(self, read: Mapping[str, Mapping[str, float]]) -> bool:
        """Whether the judges do not hold the same single text best, or one that may not be accepted."""
        free, best = {name: by for name, by in read.items() if name not in self.barred}, set[str]()
        for judge in next(iter(free.values()), {}):
            top = max(by[judge] for by in free.values())
            best |= {name for name, by in free.items() if by[judge] >= top - 1e-9}
        return len({self.texts[name] for name in best}) > 1 or not best.isdisjoint(self.cut)

    def _turns(self) -> Iterator[Problem]:
        """Judges that were asked or skipped against the levels. No judge is asked to compare fewer than two
        different texts."""
        given = [name for name, row in self.answers.items() if row["response"] is not None]
        several = len({self.texts[name] for name in given}) > 1
        for judge in itertools.chain(*self.levels):
            rows = [row for row in self.verdicts if row["judge"] == judge and row["candidate_id"] in given]
            turn = judge in self.asked and several
            if len(self.levels) > 1 and any(is_skipped(row) == turn for row in rows):
                late = "it is in the audit slice" if in_slice(self.prompt["prompt_id"]) else "the pick was open"
                why = f"skipped, but {late}" if turn else "asked, but the pick was settled without"
                yield Problem("level", "verdicts", self.prompt["prompt_id"], f"{judge} was {why}")

    def _labels(self) -> dict[str, str]:
        known = [name for name in self.answers if name in self.scores and name not in self.barred]
        found = {name: "discard" if name in known else "incomplete" for name in self.answers}
        top = max((self.scores[name] for name in known if name not in self.cut), default=-math.inf)
        for name in [name for name in known if name in self.cut and self.scores[name] >= top - 1e-9]:
            found[name] = "incomplete"
            known.remove(name)
        lower = [name for name in known if self.scores[name] < top - 1e-9]
        if lower:
            best = [name for name in known if name not in lower]
            found[min(best, key=lambda name: (self.answers[name]["k"], name))] = "desirable"
        return found | dict.fromkeys(lower, "undesirable")

    def check(self, training: Mapping[str, Sequence[Row]]) -> Iterator[Problem]:
        if self.twice:
            yield Problem("duplicate", "candidates", self.prompt["prompt_id"], f"{self.twice} ids occur twice")
        yield from self._turns()
        yield from self._decisions()
        for kind, rows in training.items():
            keys = [(row["chosen_id"], row["rejected_id"]) if kind == "dpo" else (row["candidate_id"],) for row in rows]
            for key, row in zip(keys, rows, strict=True):
                name = " over ".join(key)
                if keys.count(key) > 1:
                    yield Problem("duplicate", kind, name, "the row occurs more than once")
                if strangers := [one for one in key if one not in self.answers]:
                    yield Problem("orphan", kind, name, f"{strangers[0]} is not a response to this prompt")
                    continue
                if row["prompt"] != self.prompt["messages"]:
                    yield Problem("messages", kind, name, "the row's prompt is not the prompt's messages")
                if {row["split"], row["file_split"]} != {self.prompt["split"]}:
                    yield Problem("split", kind, name, f"the prompt is in {self.prompt['split']}")
                yield from self._completions(kind, name, row)

    def check_copies(
        self, training: Mapping[str, Sequence[Row]], rules: int, every_rejected: bool
    ) -> Iterator[Problem]:
        """Equal answers or pairs are one row, which has their number."""
        same: dict[str, list[str]] = collections.defaultdict(list)
        for name, label in self.labels.items():
            if label in ("desirable", "undesirable"):
                same[normalise_text(self.answers[name]["response"] or "")].append(name)
        pairs = sum(row["copies"] or 0 for row in training.get("dpo", ()))
        for kind, row in ((kind, row) for kind, rows in training.items() if rules > 2 for row in rows):
            text = row["rejected"] if kind == "dpo" else row["completion"]
            equal = same[normalise_text(text[-1]["content"])]
            if kind == "sft":  # without the pairs, their number is between one and that of the other responses
                expected = pairs if "dpo" in training else min(max(row["copies"] or 0, 1), len(self.labels) - 1)
            elif kind == "dpo":
                expected = sum(self.labels[name] == "undesirable" for name in equal) if every_rejected else 1
            else:
                alone = len({self.labels[name] for name in equal}) == 1 and row["candidate_id"] == min(equal)
                expected = len(equal) if alone else 0
            if row["copies"] != expected:
                yield Problem("repeated", kind, row_id(kind, row), f"copies is {row['copies']}, should be {expected}")

    def _decisions(self) -> Iterator[Problem]:
        decided = {row["candidate_id"]: row for row in self.decisions}
        for name, label in self.labels.items():
            if name not in decided:
                yield Problem("missing", "decisions", name, "the response has no decision")
                continue
            row, score = decided[name], self.scores.get(name)
            final = row["final_score"]
            if (score is None) != (final is None) or (score is not None and abs(score - final) > 1e-9):
                yield Problem("numbers", "decisions", name, f"final score {final}, the verdicts give {score}")
            if row["label"] != label:
                yield Problem("label", "decisions", name, f"{row['label']}, the scores give {label}")

    def _completions(self, kind: str, name: str, row: Row) -> Iterator[Problem]:
        sides = {"kto": ["completion"], "sft": ["completion"], "dpo": ["chosen", "rejected"]}[kind]
        for side in sides:
            own = row["candidate_id"] if side == "completion" else row[f"{side}_id"]
            if [m["content"] for m in row[side]] != [self.answers[own]["response"]]:
                yield Problem("completion", kind, name, f"{side} is not the response of {own}")
        if kind == "kto" and self.labels[row["candidate_id"]] != ("desirable" if row["label"] else "undesirable"):
            yield Problem(
                "label", kind, name, f"label {row['label']}, the pick says {self.labels[row['candidate_id']]}"
            )
        if kind != "dpo":
            return
        pick = self.labels[row["chosen_id"]], self.labels[row["rejected_id"]]
        if pick != ("desirable", "undesirable"):
            yield Problem("pair", kind, name, f"a {pick[0]} response over a {pick[1]} one")
        elif self.scores[row["chosen_id"]] - self.scores[row["rejected_id"]] < self.min_gap - 1e-9:
            yield Problem("pair", kind, name, f"the gap is under {self.min_gap:g}")
        if normalise_text(row["chosen"][0]["content"]) == normalise_text(row["rejected"][0]["content"]):
            yield Problem("pair", kind, name, "both sides are the same text")
