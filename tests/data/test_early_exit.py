"""Early exit against all replies that could have followed, in the gate's formulas written out again."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.agents.judges import Rubric
from ray_pipeline.data.critic import CRITIC, _Critic
from ray_pipeline.data.early_exit import ExitRule, Known, in_audit_slice, known_of, settle
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.data.judging import JUDGES, _Judging
from ray_pipeline.store.schemas import CRITIQUES, VERDICTS, to_table
from tests.data.test_llm_stages import COLD, TEXTS, Shard
from tests.planted import Planted, World, ended, make_world
from tests.scripted import ScriptedEngine

KEPT = ("desirable", "undesirable")
#: A judge's score, or None where its reply cannot be read; the critic's word likewise.
Replies = tuple[tuple[float | None, ...], bool | None]

halves = st.integers(0, 24).map(lambda n: n / 2)


@st.composite
def gates(draw: Any) -> GateConfig:
    low = draw(halves)
    return GateConfig(
        alpha=draw(st.sampled_from([0.0, 0.15, 0.3, 0.5, 1.0])),
        tau=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.5, 4.0])),
        undesirable_at=low,
        desirable_at=low + draw(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0])),
        use_variance=draw(st.booleans()),
        use_critic=draw(st.booleans()),
        cut=draw(st.sampled_from(["exclude", "undesirable", "keep"])),
    )


@st.composite
def panels(draw: Any) -> tuple[ExitRule, list[float | None], bool | None, bool]:
    """A rule, all replies of a candidate, and whether its text was cut off."""
    judges, low, width = draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.integers(1, 5))
    rule = ExitRule(
        exact=draw(st.sampled_from(["labels", "scores"])),
        gate=draw(gates()),
        judges=tuple("abc"[:judges]),
        scale=(low, low + width),
    )
    whole = st.integers(low, low + width).map(float)
    scores = [draw(st.one_of(whole, whole, whole, st.none())) for _ in rule.judges]
    if scores[0] is not None:  # the first may be a program, whose scores need not be whole
        scores[0] += draw(st.sampled_from([0.0, 0.0, 0.25]))
    return rule, scores, draw(st.sampled_from([True, False, None])), draw(st.booleans())


def label_of(scores: Sequence[float | None], flawed: bool | None, cut: bool, gate: GateConfig) -> str:
    if cut and gate.cut == "exclude":
        return "incomplete"
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return "incomplete"
    if gate.use_variance and len(known) > 1 and statistics.variance(known) > gate.tau:
        return "abstain"
    if gate.use_critic and flawed is None:
        return "incomplete"
    final = statistics.mean(known) * (1.0 - gate.alpha * bool(gate.use_critic and flawed))
    if final >= gate.desirable_at:
        return "incomplete" if cut and gate.cut == "undesirable" else "desirable"
    return "undesirable" if final <= gate.undesirable_at else "discard"


def followed(rule: ExitRule, scores: Sequence[float | None], flawed: bool | None, cut: bool) -> tuple[int, bool]:
    """How many judges are asked, and whether the critic is."""
    known = Known(cut=cut)
    asked = 0
    for judge, score in zip(rule.judges, scores, strict=True):
        if rule.settled(known):
            break
        known.scores[judge] = math.nan if score is None else score
        asked += 1
    return asked, rule.gate.use_critic and not rule.settled(known)


def continuations(rule: ExitRule, asked: Sequence[float | None], unread: bool) -> list[Replies]:
    """All replies that begin with those of the judges that were asked."""
    levels: list[float | None] = [float(score) for score in range(rule.scale[0], rule.scale[1] + 1)]
    rest = itertools.product(levels + [None] * unread, repeat=len(rule.judges) - len(asked))
    critics = [True, False, *([None] * unread)] if rule.gate.use_critic else [False]
    return [((*asked, *more), flawed) for more in rest for flawed in critics]


def tables_of(rule: ExitRule, replies: Sequence[Replies], cut: bool) -> World:
    answers: list[Planted] = [("an answer", scores, flawed) for scores, flawed in replies]
    world = make_world({"question": answers}, rule.judges)
    return ended(world, "length") if cut else world


def skip(world: World, judges: Sequence[str], critic: bool) -> World:
    """The same rows, with those of some judges and perhaps the critic skipped."""
    verdicts = [
        {**row, "score": None, "parse_status": "skipped"} if row["judge"] in judges else row
        for row in world.verdicts.to_pylist()
    ]
    critiques = [
        {**row, "flawed": None, "parse_status": "skipped"} if critic else row for row in world.critiques.to_pylist()
    ]
    return World(world.prompts, world.candidates, to_table(verdicts, VERDICTS), to_table(critiques, CRITIQUES))


def decided(rule: ExitRule, world: World) -> tuple[pa.Table, int]:
    given = (world.candidates, world.verdicts, world.critiques, rule.judges, rule.gate)
    return settle(decide(*given), *given, rule.scale)


@settings(max_examples=150, deadline=None)
@given(panels())
def test_a_call_is_skipped_exactly_when_no_reply_can_matter(
    panel: tuple[ExitRule, list[float | None], bool | None, bool],
) -> None:
    rule, scores, flawed, cut = panel
    asked, critic = followed(rule, scores, flawed, cut)
    every_judge = asked == len(scores)
    if every_judge and (critic or not rule.gate.use_critic):
        world = tables_of(rule, [(tuple(scores), flawed)], cut)
        table, open_labels = decided(rule, world)
        assert (table["label"].to_pylist(), open_labels) == ([label_of(scores, flawed, cut, rule.gate)], 0)
        given = (world.candidates, world.verdicts, world.critiques, rule.judges, rule.gate)
        assert table.equals(decide(*given))
    else:
        assert not critic
        # What was made decides alone: whatever the others would have replied, the stored label is that of all replies.
        possible = continuations(rule, scores[:asked], unread=False)
        off = tables_of(rule, possible, cut)
        labels = {label_of(*replies, cut, rule.gate) for replies in possible}
        assert len(labels) == 1
        table, open_labels = decided(rule, skip(off, rule.judges[asked:], rule.gate.use_critic))
        assert set(table["label"].to_pylist()) == labels and open_labels == 0
        plain = decide(off.candidates, off.verdicts, off.critiques, rule.judges, rule.gate)
        assert table["label"].equals(plain["label"])
        # A reply that cannot be read would have made it incomplete; no training row is lost or won with `scores`.
        for replies in continuations(rule, scores[:asked], unread=True):
            label = label_of(*replies, cut, rule.gate)
            assert label in labels | {"incomplete"}
            if rule.exact == "scores":
                assert label not in KEPT
    # Every call that was made could matter when it was made.
    for made in range(asked):
        labels = {label_of(*replies, cut, rule.gate) for replies in continuations(rule, scores[:made], unread=False)}
        assert len(labels) > 1 or (rule.exact == "scores" and labels < set(KEPT))
    if critic:
        labels = {label_of(*replies, cut, rule.gate) for replies in continuations(rule, scores, unread=False)}
        assert len(labels) > 1 or (rule.exact == "scores" and labels < set(KEPT))


@pytest.mark.parametrize(("exact", "triples"), [("labels", 62), ("scores", 182)])
def test_the_critic_by_need_under_the_published_gate(exact: Any, triples: int) -> None:
    """docs/architecture.md: of the 1,000 triples of scores that three judges can give."""
    rule = ExitRule(exact=exact, gate=GateConfig(), judges=("a", "b", "c"), scale=(1, 10))
    scores = itertools.product(map(float, range(1, 11)), repeat=3)
    asked = [not rule.settled(Known(scores=dict(zip("abc", triple, strict=True)))) for triple in scores]
    assert sum(asked) == triples


def test_other_thresholds_find_the_labels_that_need_skipped_calls() -> None:
    """A wide scale of five judges: combinations are not tried before they are few, and an open label is no value."""
    rule = ExitRule(exact="labels", gate=GateConfig(), judges=("a", "b", "c"), scale=(1, 10))
    world = skip(tables_of(rule, [((1.0, 10.0, 5.0), True), ((9.0, 9.0, 9.0), True)], False), ["c"], True)
    table, open_labels = decided(rule, world)
    assert table["label"].to_pylist() == ["abstain", "incomplete"] and open_labels == 1
    assert table["why"].to_pylist() == [
        "abstain whatever the reply: c, critic skipped",
        "skipped, but the label depends on it: c, critic",
    ]
    assert table["final_score"].to_pylist() == [None, None]
    many = ExitRule(exact="labels", gate=GateConfig(), judges=tuple("abcde"), scale=(1, 100))
    assert not many.settled(Known(scores={"a": 1.0, "b": 100.0}))
    assert many.settled(Known(scores={"a": 1.0, "b": 100.0, "c": 50.0, "d": 50.0}))
    assert many.settled(Known(scores={"a": math.nan}))


# --- the stages -------------------------------------------------------------------------------------------------------

SCORES = {f"answer {n}": scores for n, scores in enumerate(itertools.product((1, 4, 7, 8, 10), repeat=3))}
NAMES = ("helpfulness", "factuality", "conciseness")


def script(messages: Any, sampling: Any) -> str:
    """Scores of the planted answers; the critic finds every third flawed; some replies of one judge have no score."""
    text = json.dumps(messages)
    number = int(re.findall(r"answer (\d+)", text)[0])
    if "failure_type" in str(sampling.grammar and sampling.grammar.decoded()):
        flawed = number % 3 == 0
        return json.dumps({"reason": "", "flawed": flawed, "failure_type": "circular" if flawed else "none"})
    judge = next(place for place, name in enumerate(NAMES) if f"about {name}" in text)
    if number % 17 == 5 and judge == 0:
        return "no comment"
    return json.dumps({"reason": "", "score": SCORES[f"answer {number}"][judge]})


def judged(folder: Path, rule: ExitRule | None) -> tuple[World, int]:
    """Candidates through judges and critic, and the number of calls."""
    answers: list[Planted] = [(f"{text} it is", (None,) * 3, None) for text in SCORES]
    world = make_world({"question": answers}, NAMES)
    rubrics = tuple(Rubric(name=name, text=f"It is about {name}.") for name in NAMES)
    engine, shared = ScriptedEngine(script), {"sampling": COLD, "asking": {"retries": 0}, "exit_rule": rule}
    tables = {"prompts": world.prompts, "candidates": world.candidates}
    judging = _Judging(answers=("candidates",), rubrics=rubrics, template=TEXTS.judge, layout="shared_first", **shared)
    verdicts = Shard(tables, judging).run(JUDGES, engine, folder).tables["verdicts"]
    asking = _Critic(template=TEXTS.critic, layout="rubric_first", **shared)
    critic = Shard({**tables, "verdicts/judge": verdicts}, asking)
    critiques = critic.run(CRITIC, engine, folder).tables["critiques"]
    return World(world.prompts, world.candidates, verdicts, critiques), engine.calls


@pytest.mark.parametrize("exact", ["labels", "scores"])
def test_stages_make_fewer_calls_and_the_gate_the_same_labels(exact: Any, tmp_path: Path) -> None:
    rule = ExitRule(exact=exact, gate=GateConfig(), judges=NAMES, scale=(1, 10))
    off, calls = judged(tmp_path / "off", None)
    on, fewer = judged(tmp_path / "on", rule)
    assert calls == 4 * len(SCORES)
    plain = decide(off.candidates, off.verdicts, off.critiques, NAMES, rule.gate)
    table, open_labels = decided(rule, on)
    assert table["label"].equals(plain["label"]) and open_labels == 0
    statuses = on.verdicts["parse_status"].to_pylist() + on.critiques["parse_status"].to_pylist()
    assert statuses.count("skipped") == calls - fewer > calls / 4
    kept = [label in KEPT for label in plain["label"].to_pylist()]
    assert any(kept)
    if exact == "scores":
        assert table.filter(pa.array(kept)).equals(plain.filter(pa.array(kept)))
    # The audit slice has every reply, and so has the same rows as without early exit.
    mine = [in_audit_slice(name) for name in on.verdicts["candidate_id"].to_pylist()]
    assert 0 < sum(mine) < len(mine) / 5
    assert on.verdicts.filter(pa.array(mine)).equals(off.verdicts.filter(pa.array(mine)))
    asked = known_of(on.candidates, [on.verdicts], on.critiques)
    for row in plain.to_pylist():
        if in_audit_slice(row["candidate_id"]):
            assert len(asked[row["candidate_id"]].scores) == 3 and asked[row["candidate_id"]].flawed is not None
