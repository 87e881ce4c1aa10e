"""The audit: every training row is traced back, by ids, to its decision, verdicts, critique, candidate and prompt.

None of the arithmetic of the gate or the datasets stage is reused (`formulas.py`), and the rules are written out again
row by row, so that a mistake in either of the two shows.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ray_pipeline.audit.findings import AuditReport, Findings, Row, RunTables, row_id, shard_or_none
from ray_pipeline.audit.formulas import (
    OPEN,
    certified_label,
    close,
    gate_label,
    gate_numbers,
    is_empty,
    is_skipped,
    label_without,
    read_score,
    row_weight,
)
from ray_pipeline.audit.levels import judges_asked
from ray_pipeline.audit.posterior import PosteriorCheck, posterior_label
from ray_pipeline.audit.recomputed import Recomputed
from ray_pipeline.data.tokens import Encode
from ray_pipeline.store import keys
from ray_pipeline.store.files import Folder


def audit_run(run: RunTables, encode: Encode | None = None, max_problems: int = 100) -> AuditReport:
    """Check a finished run, one shard of its tables and the training rows in memory.

    Args:
        encode: token counter of the policy (`tokens.TokenCounter`). With it, each row that was left out for its length
            is measured again; without it, their number is compared with the counts in stats.json.
        max_problems: how many problems are described; all are counted.

    Raises:
        StoreError: stats.json of the datasets folder is not valid JSON. (Other unreadable files are problems.)
        FileNotFoundError: the folder has no stats.json: the datasets stage has not finished.
    """
    audit = Findings(run, encode, max_problems)
    stats = Folder(run.datasets).read_json("stats.json", set_aside=True)
    audit.rules = stats.get("rules", 1)
    training = audit.training_rows(stats["fingerprint"])
    posterior = None if run.posterior is None else PosteriorCheck(run.posterior, run.judges, run.gate)
    for shard in range(run.prompts.num_shards):
        _Shard(audit, shard, training, posterior).check()
    for message in () if posterior is None else posterior.problems():
        audit.problem("posterior", "decisions", "model", message)
    for kind in run.config.kinds:
        for number in range(run.prompts.num_shards):
            training[kind].pop(number, None)
        for rows in training[kind].values():  # rows that belong to no shard
            for row in rows:
                audit.problem("orphan", kind, row_id(kind, row), f"prompt id {row['prompt_id']!r} belongs to no shard")
    audit.check_counts(stats)
    return AuditReport(dict(audit.rows), dict(audit.found), audit.problems)


class _Shard:
    """One shard: all its rows by key, and the checks on them."""

    def __init__(
        self,
        audit: Findings,
        shard: int,
        training: Mapping[str, Mapping[int, list[Row]]],
        posterior: PosteriorCheck | None,
    ) -> None:
        self.audit, self.run, self.number, self.posterior = audit, audit.run, shard, posterior
        run = audit.run
        self.prompts = self._index("prompts", audit.read(run.prompts, shard), "prompt_id")
        self.candidates = self._index("candidates", audit.read(run.candidates, shard), "candidate_id")
        verdicts = [row for table in run.verdicts for row in audit.read(table, shard)]
        self.verdicts = self._index("verdicts", verdicts, "candidate_id", "judge")
        critiques = audit.read(run.critiques, shard) if run.critiques and run.gate.use_critic else []
        self.critiques = self._index("critiques", critiques, "candidate_id")
        self.decisions = self._index("decisions", audit.read(run.decisions, shard), "candidate_id")
        self.training = {kind: training[kind].get(shard, []) for kind in run.config.kinds}
        lists = [row for table in run.checklists for row in audit.read(table, shard)]
        self.recomputed = Recomputed(run, lists)
        self._texts: dict[tuple[str, str], list[str]] = collections.defaultdict(list)

    def check(self) -> None:
        for prompt in self.prompts.values():
            self._check_prompt(prompt)
        self._check_links()
        for candidate in self.candidates.values():
            for kind, message in self.recomputed.problems(
                self.prompts.get(candidate["prompt_id"]), candidate, self.verdicts
            ):
                self.audit.problem(kind, "verdicts", candidate["candidate_id"], message)
            self._check_decision(candidate)
        for name, message in self.recomputed.rewards(self.candidates, self.verdicts):
            self.audit.problem("reward", "verdicts", name, message)
        if "kto" in self.training:
            self._check_kto(self.training["kto"])
        if "dpo" in self.training:
            self._check_dpo(self.training["dpo"])
        if "sft" in self.training:
            self._check_sft(self.training["sft"])

    # --- tables of the run ---

    def _index(self, table: str, rows: Iterable[Row], *key: str) -> dict[Any, Row]:
        """Rows by key (a tuple where it has several columns); reports repeated keys and rows of other shards."""
        found: dict[Any, Row] = {}
        for row in rows:
            name = tuple(row[k] for k in key) if len(key) > 1 else row[key[0]]
            text = " by ".join(row[k] for k in key)
            if name in found:
                self.audit.problem("duplicate", table, text, "the key occurs twice in the table")
                continue
            found[name] = row
            home = shard_or_none(row["prompt_id"], self.run.prompts.num_shards)
            if home != self.number:
                where = "no shard" if home < 0 else f"shard {home}"
                self.audit.problem(
                    "shard", table, text, f"prompt {row['prompt_id']!r} belongs to {where}, the row is in {self.number}"
                )
        return found

    def _check_prompt(self, prompt: Row) -> None:
        if (expected := keys.prompt_id(prompt["messages"])) != prompt["prompt_id"]:
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
        cut = self._is_cut(candidate)
        asked, wrong = judges_asked(self.run, candidate, cut and self.run.gate.cut == "exclude", self.verdicts)
        for message in wrong:
            self.audit.problem("level", "verdicts", name, message)
        verdicts = [self.verdicts.get((name, judge)) for judge in asked]
        scores = [read_score(row, "score") for row in verdicts]
        flawed = read_score(self.critiques.get(name), "flawed") if self.run.gate.use_critic else False
        numbers = {"numbers": gate_numbers(scores, flawed, self.run.gate)}
        numbers |= {} if self.posterior is None else {"posterior": self.posterior.expected(scores)}
        for kind, column, expected in ((k, c, value) for k, found in numbers.items() for c, value in found.items()):
            if not close(decision[column], expected):
                self.audit.problem(kind, "decisions", name, f"{column} is {decision[column]}, should be {expected}")
        # The label is derived from the stored numbers: a threshold missed by 1e-16 through rounding is not a problem.
        label = gate_label(None not in scores, flawed is not None, decision, self.run.gate)
        known = [OPEN if is_skipped(row) else score for row, score in zip(verdicts, scores, strict=True)]
        critic = OPEN if self.run.gate.use_critic and is_skipped(self.critiques.get(name)) else flawed
        if self.run.scale is not None and not self.run.levels and OPEN in (*known, critic):
            label = label_without(tuple(known), critic, self.run.gate, self.run.scale)
        if self.run.gate.kind == "posterior":
            label = posterior_label(decision, self.run.gate) if None not in (*scores, flawed) else "incomplete"
        if cut and (self.run.gate.cut == "exclude" or label == "desirable"):
            label = "incomplete"
        if self.run.gate.kind == "certified":
            label = certified_label(label, decision, self.run.gate, self.run.threshold)
        if decision["final_score"] is not None:
            label = self.run.humans.get(name, label)
        if decision["label"] != label:
            self.audit.problem("label", "decisions", name, f"label is {decision['label']!r}, should be {label!r}")

    def _is_cut(self, candidate: Row) -> bool:
        """Whether a candidate's text is not whole and the gate has a rule for that."""
        ended = ("stop", "refusal", "unknown", "too_long", "error")
        return self.audit.rules > 1 and self.run.gate.cut != "keep" and candidate["finish_reason"] not in ended

    def _same(self, name: str) -> list[str]:
        """Ids of the labelled candidates with this candidate's prompt and text, itself included."""
        if not self._texts:
            for other, decision in self.decisions.items():
                text = self.candidates[other]["response"] if other in self.candidates else None
                if decision["label"] in ("desirable", "undesirable") and not is_empty(text):
                    self._texts[decision["prompt_id"], keys.normalise_text(text or "")].append(other)
        owner = self.candidates[name]
        return (
            self._texts[owner["prompt_id"], keys.normalise_text(owner["response"])] if self.audit.rules > 1 else [name]
        )

    def _left_out(self, name: str) -> str | None:
        """Why a labelled answer that equals others is left out; None if it is not."""
        same = self._same(name) or [name]  # none where ids are damaged, which is reported elsewhere
        if len({self.decisions[other]["label"] for other in same}) > 1:
            return "contradictory"
        return "repeated" if name != min(same) else None

    # --- training rows ---

    def _answers(self, kind: str, rows: list[Row], present: set[str]) -> Iterator[tuple[str, Row, Row, Row]]:
        """Id, training row, candidate and decision of each answer, checked as far as KTO and SFT rows agree.

        Args:
            present: receives the id of every answer.
        """
        report = self.audit.problem
        for row in rows:
            name = row["candidate_id"]
            if name in present:
                report("duplicate", kind, name, "the candidate occurs twice")
                continue
            present.add(name)
            owner = self._owner(kind, name, row, name)
            if owner is None:
                continue
            candidate, decision, _ = owner
            self._check_answer(kind, name, "completion", row["completion"], candidate)
            if not close(row["final_score"], decision["final_score"]):
                report("scores", kind, name, f"final_score {row['final_score']}, decided {decision['final_score']}")
            yield name, row, candidate, decision

    def _check_kto(self, rows: list[Row]) -> None:
        report = self.audit.problem
        present: set[str] = set()
        for name, row, candidate, decision in self._answers("kto", rows, present):
            if decision["label"] != ("desirable" if row["label"] else "undesirable"):
                report("label", "kto", name, f"label is {row['label']}, but the decision is {decision['label']!r}")
            verdicts = {judge: self.verdicts.get((name, judge)) for judge in self.run.judges}
            expected = [(j, read_score(verdict, "score")) for j, verdict in verdicts.items() if not is_skipped(verdict)]
            if sorted((s["judge"], s["score"]) for s in row["scores"]) != sorted(expected):
                report("scores", "kto", name, f"scores {row['scores']}, but the verdicts are {expected}")
            self._check_weight("kto", name, row, {name: row["label"]})
            if is_empty(candidate["response"]):
                report("completion", "kto", name, "the response is empty and should have been left out")
            elif reason := self._left_out(name):
                report("repeated", "kto", name, f"the answer is {reason} and should have been left out")
            elif self.audit.rules > 1 and row["copies"] != len(self._same(name)):
                report("repeated", "kto", name, f"copies is {row['copies']}, should be {len(self._same(name))}")
            if self._too_long(row["prompt_id"]):
                report("length", "kto", name, "the prompt is over max_prompt_length and should have been left out")
        self._check_kto_is_complete(present)

    def _check_kto_is_complete(self, present: set[str]) -> None:
        counted = self.audit.counted["kto"]
        absent: dict[str, list[str]] = collections.defaultdict(list)
        for name, decision in self.decisions.items():
            if decision["label"] not in ("desirable", "undesirable") or name not in self.candidates:
                continue
            if is_empty(self.candidates[name]["response"]):
                counted["empty_response"] += 1
            elif name not in present and (reason := self._left_out(name)):
                counted[reason] += 1
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
        for name, row, _, decision in self._answers("sft", rows, present):
            self._check_once("sft", name, row)
            if decision["label"] != "desirable":
                report("label", "sft", name, f"an answer to imitate, but the decision is {decision['label']!r}")
            if "dpo" in self.training and name not in chosen:
                report("pair", "sft", name, "no pair has chosen it")
        for name in chosen - present:
            report("missing", "sft", name, "a pair has chosen it, but it has no row")

    def _check_once(self, kind: str, name: str, row: Row) -> None:
        """A prompt has one pair at most, so a pair, or its chosen answer, stands for no other."""
        if self.audit.rules > 2 and row["copies"] != 1:
            self.audit.problem("repeated", kind, name, f"copies is {row['copies']}, should be 1")

    def _check_weight(self, kind: str, name: str, row: Row, sides: Mapping[str, bool]) -> None:
        if not self.run.config.weights or self.run.scale is None:
            return
        verdicts = {one: [self.verdicts.get((one, judge)) for judge in self.run.judges] for one in sides}
        scores = [([read_score(verdict, "score") for verdict in verdicts[one]], good) for one, good in sides.items()]
        if not close(row["weight"], expected := row_weight(scores, self.run.scale)):
            self.audit.problem("weight", kind, name, f"weight is {row['weight']}, should be {expected}")

    def _check_dpo(self, rows: list[Row]) -> None:
        report = self.audit.problem
        by_prompt: dict[str, Row] = {}
        for row in rows:
            name = row_id("dpo", row)
            if row["prompt_id"] in by_prompt:
                report("duplicate", "dpo", name, f"prompt {row['prompt_id']} has two pairs")
                continue
            by_prompt[row["prompt_id"]] = row
            self._check_once("dpo", name, row)
            self._check_weight("dpo", name, row, {row["chosen_id"]: True, row["rejected_id"]: False})
            for side in ("chosen", "rejected"):
                owner = self._owner("dpo", row[f"{side}_id"], row, name)
                if owner is None:
                    continue
                candidate, decision, _ = owner
                self._check_answer("dpo", name, side, row[side], candidate)
                if not close(row[f"score_{side}"], decision["final_score"]):
                    report("scores", "dpo", name, f"score_{side} is not the decision's {decision['final_score']}")
            if not close(row["score_gap"], row["score_chosen"] - row["score_rejected"]):
                report("scores", "dpo", name, f"score_gap {row['score_gap']} is not score_chosen - score_rejected")
        self._check_pairs(by_prompt)

    def _check_pairs(self, by_prompt: Mapping[str, Row]) -> None:
        """Check that each prompt has the expected pair, or none for a reason."""
        counted = self.audit.counted["dpo"]
        members: dict[str, list[Row]] = {}
        for name, decision in self.decisions.items():
            if name in self.candidates:
                members.setdefault(decision["prompt_id"], [])
                if not is_empty(self.candidates[name]["response"]):
                    members[decision["prompt_id"]].append(decision)
        for prompt, decisions in members.items():
            reason, pair = self._expected_pair(prompt, decisions)
            row = by_prompt.get(prompt)
            if row is None:
                if reason is None and self.audit.encode:
                    self.audit.problem("missing", "dpo", prompt, f"the prompt has no pair, but should have {pair}")
                counted[reason or "unexplained"] += 1
            elif reason is not None:
                self.audit.problem("pair", "dpo", row_id("dpo", row), f"the pair should have been left out: {reason}")
            elif (row["chosen_id"], row["rejected_id"]) != pair:
                self.audit.problem("pair", "dpo", row_id("dpo", row), f"the pair should be {pair[0]}, {pair[1]}")

    def _expected_pair(self, prompt: str, decisions: list[Row]) -> tuple[str | None, tuple[str, str]]:
        """Why there is no pair (None if there is one, as far as can be determined), and its ids."""
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
        """Candidate, decision and prompt of a training row; reports what is missing or does not match the prompt."""
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
