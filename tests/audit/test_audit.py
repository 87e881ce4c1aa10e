"""The audit: quiet on a run of the real stages, and loud on each planted corruption."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from ray_pipeline.audit.findings import PROBLEMS, AuditReport, RunTables
from ray_pipeline.audit.rows import audit_run
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.early_exit import in_audit_slice
from ray_pipeline.data.escalation import Escalation
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import TABLES
from tests.planted import JUDGES, World, count_words, ended, make_world, random_world, skipped_by_levels, write_run

Rows = list[dict]


def test_a_sound_run(tmp_path):
    run = write_run(tmp_path, random_world(60, seed=8))
    for encode in (None, count_words):
        report = audit_run(run, encode)
        assert report.ok and not report.problems, report.problems[:3]
        assert report.rows["prompts"] == 60 and report.rows["candidates"] == 240 == report.rows["decisions"]
        assert report.rows["kto"] > 50 and report.rows["dpo"] > 10
        assert report.summary().endswith("no problem")


@pytest.mark.parametrize(
    "gate",
    [GateConfig(use_variance=False), GateConfig(use_critic=False), GateConfig(alpha=0.5, tau=0.3, desirable_at=5)],
)
def test_sound_runs_with_other_gates(tmp_path, gate):
    run = write_run(tmp_path, random_world(30, seed=1), gate=gate)
    assert audit_run(run, count_words).found == {}


def test_weights_are_computed_again(tmp_path):
    config = DatasetsConfig(max_length=60, max_prompt_length=20, weights=True)
    sound = write_run(tmp_path / "sound", random_world(30, seed=1), config=config)
    assert audit_run(sound, count_words).found == {}

    def change(kind: str, shard: int, table: pa.Table) -> pa.Table:
        if kind != "verdicts":
            return table
        mild = [{**row, "score": row["score"] and row["score"] / 2} for row in table.to_pylist()]
        return pa.Table.from_pylist(mild, schema=TABLES[kind])

    changed = write_run(tmp_path / "changed", random_world(30, seed=1), config=config, change=change)
    report = audit_run(changed, max_problems=10**6)
    assert report.found["weight"] > 10
    assert {p.table for p in report.problems if p.kind == "weight"} == {"kto", "dpo"}


@pytest.mark.parametrize("cut", ["exclude", "undesirable", "keep"])
def test_a_sound_run_with_texts_that_were_cut_off(tmp_path, cut):
    world = ended(random_world(30, seed=1), "stop", "length", "unknown", "content_filter", "error")
    assert audit_run(write_run(tmp_path, world, gate=GateConfig(cut=cut)), count_words).found == {}


RULE = Escalation(gate=GateConfig(), levels=(tuple(JUDGES[:2]), tuple(JUDGES[2:])))


@pytest.mark.parametrize(
    "gate", [GateConfig(), GateConfig(use_critic=False, tau=0.3), GateConfig(cut="undesirable", use_variance=False)]
)
def test_sound_runs_with_levels_of_judges(tmp_path, gate):
    rule, world = RULE.model_copy(update={"gate": gate}), ended(random_world(60, seed=8), "stop", "stop", "length")
    run = write_run(tmp_path, world, gate=gate, rule=rule)
    assert audit_run(run, count_words).problems == []


def test_labels_and_calls_against_the_levels_are_found(tmp_path):
    """A label that another number of judges would give, a judge who was skipped though the label was open, and one who
    was asked though it was settled."""
    world = skipped_by_levels(random_world(60, seed=8), RULE)
    rows = world.verdicts.to_pylist()
    third = {row["candidate_id"]: row for row in rows if row["judge"] == JUDGES[2]}
    names = world.candidates["candidate_id"].to_pylist()
    skipped = [name for name in names if third[name]["parse_status"] == "skipped"]
    asked = [name for name in names if third[name]["parse_status"] == "ok" and not in_audit_slice(name)]
    sliced = next(name for name in names if third[name]["parse_status"] == "ok" and in_audit_slice(name))
    alone, in_vain, lost = skipped[0], skipped[1], asked[0]

    def change(kind: str, shard: int, table: pa.Table) -> pa.Table:
        found = table.to_pylist()
        for row in found:
            name = row.get("candidate_id")
            if kind == "decisions" and name == alone:  # as if the third judge had been asked and had disagreed
                row |= {"label": "abstain", "why": "variance 9.00 > 2.5 (level 2 of 2)"}
            if kind == "verdicts" and row["judge"] == JUDGES[2] and name == in_vain:
                row |= {"score": 5.0, "parse_status": "ok"}
            if kind == "verdicts" and row["judge"] == JUDGES[2] and name in (lost, sliced):
                row |= {"score": None, "parse_status": "skipped"}
        return pa.Table.from_pylist(found, schema=table.schema)

    report = audit_run(write_run(tmp_path, random_world(60, seed=8), rule=RULE, change=change), count_words)
    tables = ("decisions", "verdicts")
    found = {(problem.kind, problem.id): problem.message for problem in report.problems if problem.table in tables}
    assert found["label", alone].startswith("label is 'abstain', should be ")
    assert found["level", in_vain] == f"{JUDGES[2]} was asked, but the label was settled without"
    assert found["level", lost] == f"{JUDGES[2]} was skipped, but its label was open"
    assert found["level", sliced] == f"{JUDGES[2]} was skipped, but it is in the audit slice"
    assert report.found["level"] == 3 and ("label", lost) in found


def test_a_sound_run_with_every_reason_for_leaving_out(tmp_path):
    good, bad, long = (9, 9, 9), (2, 2, 2), " ".join(["w"] * 70)
    world = make_world(
        {
            "fine": [("a", good, False), ("b", bad, False)],
            "empty": [("", good, False), (None, bad, False)],
            "same": [("a ", good, False), ("a", bad, False)],
            " ".join(["long"] * 30): [("a", good, False), ("b", bad, False)],
            "cut": [(long, good, False), (long + " more", bad, False)],
            "alone": [("a", good, False)],
            "near": [("a", (7, 7, 7), False), ("b", (4, 4, 4), False)],
            "again": [("a", good, False), ("a", good, False), ("b", bad, False), (" b", bad, False)],
            "torn": [("a", good, False), ("a", bad, False), ("b", bad, False), ("c", good, False)],
        }
    )
    config = DatasetsConfig(max_length=60, max_prompt_length=20, min_gap=3.5)
    run = write_run(tmp_path, world, config=config, num_shards=1)
    for encode in (None, count_words):
        assert audit_run(run, encode).problems == []


# --- planted corruption -----------------------------------------------------------------------------------------------


def corrupted(tmp_path, kind: str, damage: Callable[[Rows], Rows], encode=count_words) -> AuditReport:
    """Audit of a sound run in which the rows of one table were damaged; only the first shard that can be."""
    done = []

    def change(table_kind: str, shard: int, table: pa.Table) -> pa.Table:
        if table_kind != kind or done or table.num_rows < 4:
            return table
        done.append(shard)
        return pa.Table.from_pylist(damage(table.to_pylist()), schema=TABLES[kind])

    run = write_run(tmp_path, random_world(40, seed=8), change=change)
    assert done
    return audit_run(run, encode)


def edit(**changes) -> Callable[[Rows], Rows]:
    """Change the first row that has another value; callables get the row."""

    def damage(rows: Rows) -> Rows:
        for row in rows:
            new = {k: v(row) if callable(v) else v for k, v in changes.items()}
            if any(row[k] != v for k, v in new.items()):
                row.update(new)
                return rows
        raise AssertionError("nothing to change")

    return damage


def swap(column: str) -> Callable[[Rows], Rows]:
    """The join by position of docs/architecture.md: two rows carry each other's values."""

    def damage(rows: Rows) -> Rows:
        other = next(r for r in rows if r[column] != rows[0][column])
        rows[0][column], other[column] = other[column], rows[0][column]
        return rows

    return damage


def say(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


NOBODY = "0" * 32

CORRUPTIONS: dict[str, tuple[str, Callable[[Rows], Rows], set[str]]] = {
    "prompt messages": ("prompts", edit(messages=[{"role": "user", "content": "other"}]), {"prompt_id", "messages"}),
    "prompt split": ("prompts", edit(split=lambda r: "val" if r["split"] == "train" else "train"), {"split"}),
    "prompt lost": ("prompts", lambda rows: rows[1:], {"orphan"}),
    "prompt twice": ("prompts", lambda rows: [*rows, rows[0]], {"duplicate"}),
    "candidate lost": ("candidates", lambda rows: rows[1:], {"orphan"}),
    "candidate twice": ("candidates", lambda rows: [*rows, rows[0]], {"duplicate"}),
    "candidate of another prompt": ("candidates", swap("prompt_id"), {"orphan"}),
    "responses swapped": (
        "candidates",
        lambda rows: [{**r, "response": rows[i - 1]["response"]} for i, r in enumerate(rows)],
        {"completion"},
    ),
    "verdict changed": ("verdicts", edit(score=lambda r: 1.0 if r["score"] == 10 else 10.0), {"numbers"}),
    "verdict lost": ("verdicts", lambda rows: rows[1:], {"numbers"}),
    "verdict twice": ("verdicts", lambda rows: [*rows, rows[0]], {"duplicate"}),
    "verdict of nobody": ("verdicts", lambda rows: [*rows, {**rows[0], "candidate_id": NOBODY}], {"orphan"}),
    "verdicts unread": ("verdicts", lambda rows: [{**r, "parse_status": "error"} for r in rows], {"numbers", "label"}),
    "scores joined by position": (
        "verdicts",
        lambda rows: [{**r, "score": rows[i - 1]["score"], "parse_status": rows[i - 1]["parse_status"]}
                      for i, r in enumerate(rows)],
        {"numbers", "scores"},
    ),
    "critique changed": ("critiques", lambda rows: [{**r, "flawed": not r["flawed"]} for r in rows], {"numbers"}),
    "critique of nobody": ("critiques", lambda rows: [*rows, {**rows[0], "candidate_id": NOBODY}], {"orphan"}),
    "decision mean": ("decisions", edit(mean_score=1.5), {"numbers"}),
    "decision variance": ("decisions", edit(score_variance=0.123), {"numbers"}),
    "decision final": ("decisions", edit(final_score=1.5), {"numbers"}),
    "decision label": ("decisions", edit(label="desirable"), {"label"}),
    "decision lost": ("decisions", lambda rows: rows[1:], {"missing"}),
    "decision twice": ("decisions", lambda rows: [*rows, rows[0]], {"duplicate"}),
    "decision null": ("decisions", lambda rows: [{**r, "final_score": None} for r in rows], {"numbers", "label"}),
    "kto label flipped": ("kto", edit(label=lambda r: not r["label"]), {"label"}),
    "kto labels swapped": ("kto", swap("label"), {"label"}),
    "kto completion": ("kto", edit(completion=say("other")), {"completion"}),
    "kto completions swapped": ("kto", swap("completion"), {"completion"}),
    "kto prompt": ("kto", edit(prompt=[{"role": "user", "content": "other"}]), {"messages"}),
    "kto final score": ("kto", edit(final_score=1.25), {"scores"}),
    "kto scores": ("kto", swap("scores"), {"scores"}),
    "kto split": ("kto", edit(split=lambda r: "val" if r["split"] == "train" else "train"), {"split"}),
    "kto row lost": ("kto", lambda rows: rows[1:], {"missing", "count"}),
    "kto row of nobody": ("kto", lambda rows: [*rows, {**rows[0], "candidate_id": NOBODY}], {"orphan", "count"}),
    "kto prompt of no shard": ("kto", edit(prompt_id="not hexadecimal"), {"orphan"}),
    "dpo sides swapped": (
        "dpo",
        edit(chosen_id=lambda r: r["rejected_id"], rejected_id=lambda r: r["chosen_id"]),
        {"pair", "completion", "scores"},
    ),
    "dpo texts swapped": ("dpo", edit(chosen=lambda r: r["rejected"], rejected=lambda r: r["chosen"]), {"completion"}),
    "dpo equal texts": ("dpo", edit(rejected=lambda r: r["chosen"]), {"completion"}),
    "dpo copies": ("dpo", edit(copies=2), {"repeated"}),
    "dpo gap": ("dpo", edit(score_gap=9.75), {"scores"}),
    "dpo score": ("dpo", edit(score_chosen=9.75), {"scores"}),
    "dpo prompt": ("dpo", swap("prompt"), {"messages"}),
    "dpo split": ("dpo", edit(split=lambda r: "val" if r["split"] == "train" else "train"), {"split"}),
    "dpo row lost": ("dpo", lambda rows: rows[1:], {"missing", "count"}),
    "dpo row of nobody": ("dpo", edit(chosen_id=NOBODY), {"orphan", "pair"}),
    "dpo second pair": (
        "dpo",
        lambda rows: [*rows, {**rows[0], "rejected_id": NOBODY}],
        {"duplicate", "count"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corruption_is_found(tmp_path, case):
    kind, damage, expected = CORRUPTIONS[case]
    report = corrupted(tmp_path, kind, damage)
    assert expected <= set(report.found), report.found
    assert not report.ok and report.problems
    named = [p for p in report.problems if p.kind in expected]
    assert all(p.id and p.message and p.kind in PROBLEMS for p in named)


def test_without_a_tokenizer_lost_rows_are_found_by_their_number(tmp_path):
    for kind in ("kto", "dpo"):
        assert "count" in corrupted(tmp_path / kind, kind, lambda rows: rows[1:], encode=None).found


def world_of_choices() -> World:
    good, fair, bad = (9, 9, 9), (8, 8, 8), (2, 2, 2)
    return make_world({"q": [("a", good, False), ("b", fair, False), ("c", bad, False), ("d", bad, False)]})


def test_a_pair_that_is_not_the_best_with_the_worst(tmp_path):
    """Design §6.3 and §6.13: consistent in itself, but another pair is due."""
    world = world_of_choices()
    second = world.candidates.to_pylist()[1]

    def change(kind, shard, table):
        if kind != "dpo":
            return table
        (row,) = table.to_pylist()
        row.update(chosen_id=second["candidate_id"], chosen=say("b"), score_chosen=8.0, score_gap=6.0)
        return pa.Table.from_pylist([row], schema=TABLES["dpo"])

    report = audit_run(write_run(tmp_path, world, num_shards=1, change=change), count_words)
    assert report.found == {"pair": 1}
    assert world.candidates["candidate_id"][0].as_py() in report.problems[0].message


def test_a_tie_decided_the_other_way(tmp_path):
    world = world_of_choices()
    worst = sorted(world.candidates.to_pylist()[2:], key=lambda c: c["candidate_id"])

    def change(kind, shard, table):
        if kind != "dpo":
            return table
        (row,) = table.to_pylist()
        assert row["rejected_id"] == worst[0]["candidate_id"]
        row.update(rejected_id=worst[1]["candidate_id"], rejected=say(worst[1]["response"]))
        return pa.Table.from_pylist([row], schema=TABLES["dpo"])

    assert audit_run(write_run(tmp_path, world, num_shards=1, change=change)).found == {"pair": 1}


def test_a_pair_and_a_row_that_are_over_the_limits(tmp_path):
    """The audit is asked with tighter limits than the rows were made with."""
    import dataclasses

    run = write_run(tmp_path, random_world(20, seed=8))
    tight = dataclasses.replace(run, config=run.config.model_copy(update={"max_prompt_length": 3}))
    found = audit_run(tight, count_words).found
    assert found["length"] > 0 and found["pair"] > 0
    wide = dataclasses.replace(run, config=run.config.model_copy(update={"min_gap": 9.0}))
    assert audit_run(wide, count_words).found["pair"] > 0


def test_rows_in_the_wrong_place(tmp_path):
    """A shard's file in the place of another, and the files of train and val exchanged."""
    run = write_run(tmp_path, random_world(40, seed=8))
    folder = tmp_path / "candidates"
    (folder / "shard-00001.parquet").write_bytes((folder / "shard-00000.parquet").read_bytes())
    train, val = (tmp_path / "datasets" / "kto" / s / "part-00000.parquet" for s in ("train", "val"))
    one, two = train.read_bytes(), val.read_bytes()
    train.write_bytes(two)
    val.write_bytes(one)
    report = audit_run(run, count_words)
    assert report.found["shard"] == report.rows["candidates"] / 2
    assert report.found["split"] > 0


def test_files_that_cannot_be_read(tmp_path):
    run = write_run(tmp_path, random_world(10, seed=8))
    (tmp_path / "verdicts" / "shard-00000.parquet").unlink()
    (tmp_path / "datasets" / "kto" / "train" / "part-00000.parquet").write_bytes(b"torn")
    for file in (tmp_path / "datasets" / "dpo" / "val").iterdir():
        file.unlink()
    report = audit_run(run)
    messages = [p.message for p in report.problems if p.kind == "unreadable"]
    assert report.found["unreadable"] == 3 == len(messages)
    assert any("part-00000.parquet is damaged" in m for m in messages)


def test_a_data_set_of_another_run(tmp_path):
    run = write_run(tmp_path, random_world(10, seed=8))
    stats = Folder(run.datasets)
    stats.write_json("stats.json", {**stats.read_json("stats.json"), "fingerprint": "other"})
    assert audit_run(run).found["unreadable"] == 4


def test_counts_that_lie(tmp_path):
    run = write_run(tmp_path, random_world(10, seed=8))
    path = tmp_path / "datasets" / "stats.json"
    stats = json.loads(path.read_text())
    stats["counts"]["dpo"]["dropped"]["no_desirable"] += 1
    stats["rows"]["kto"]["train"] += 1
    path.write_text(json.dumps(stats))
    assert audit_run(run).found == {"count": 2}


def test_problems_are_capped_but_counted(tmp_path):
    run = write_run(tmp_path, random_world(20, seed=8), change=unlabelled)
    report = audit_run(run, max_problems=5)
    assert len(report.problems) == 5
    assert report.found["label"] > 5
    assert "label" in report.summary()


def unlabelled(kind: str, shard: int, table: pa.Table) -> pa.Table:
    if kind != "decisions":
        return table
    return pa.Table.from_pylist([{**r, "label": "discard"} for r in table.to_pylist()], schema=TABLES[kind])


def test_a_run_without_critic_or_pairs(tmp_path):
    import dataclasses

    config = DatasetsConfig(kinds=["kto"], max_length=60, max_prompt_length=20)
    run: RunTables = write_run(tmp_path, random_world(10, seed=8), gate=GateConfig(use_critic=False), config=config)
    report = audit_run(dataclasses.replace(run, critiques=None))
    assert report.ok and "dpo" not in report.rows and "critiques" not in report.rows


def test_sft_rows_are_walked_back_too(tmp_path: Path) -> None:
    config = DatasetsConfig(kinds=["dpo", "sft"], max_length=60, max_prompt_length=20)
    world = random_world(60, seed=5)
    report = audit_run(write_run(tmp_path / "good", world, config=config), count_words)
    assert report.ok and report.rows["sft"] == report.rows["dpo"] > 0
    assert f"{report.rows['sft']} SFT rows" in report.summary()

    def damage(kind: str, shard: int, table: pa.Table) -> pa.Table:
        if kind != "sft" or table.num_rows < 2:
            return table
        rows = table.to_pylist()
        rows[0]["completion"] = rows[1]["completion"]
        return pa.Table.from_pylist([rows[0], *rows[2:]], schema=table.schema)

    found = audit_run(write_run(tmp_path / "bad", world, config=config, change=damage), count_words).found
    assert found["completion"] == found["missing"] == 2


def test_an_sft_row_of_an_answer_that_is_not_desirable(tmp_path: Path) -> None:
    """A row that agrees with its candidate in all but this: nobody should imitate the answer."""
    config = DatasetsConfig(kinds=["sft"], max_length=60, max_prompt_length=20)
    gate, world = GateConfig(), random_world(60, seed=5)
    decisions = decide(world.candidates, world.verdicts, world.critiques, JUDGES, gate).to_pylist()
    responses = {row["candidate_id"]: row["response"] for row in world.candidates.to_pylist()}
    swapped: list[str] = []

    def damage(kind: str, shard: int, table: pa.Table) -> pa.Table:
        if kind != "sft" or swapped or not table.num_rows:
            return table
        row, *others = table.to_pylist()
        bad = next(d for d in decisions if d["prompt_id"] == row["prompt_id"] and d["label"] == "undesirable")
        swapped.append(bad["candidate_id"])
        row |= {key: bad[key] for key in ("candidate_id", "final_score")}
        row["completion"] = say(responses[bad["candidate_id"]])
        return pa.Table.from_pylist([row, *others], schema=table.schema)

    run = write_run(tmp_path, world, gate, config, change=damage)
    (problem,) = audit_run(run, count_words).problems
    assert (problem.kind, problem.table, [problem.id]) == ("label", "sft", swapped)
    assert "'undesirable'" in problem.message
