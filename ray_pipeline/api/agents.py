"""Judging and improving the rows of a frame by the agents of `ray_pipeline.agents`, many calls at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import yaml

from ray_pipeline.agents import debate as debates
from ray_pipeline.agents import feedback_loop as loops
from ray_pipeline.agents import judges
from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings
from ray_pipeline.agents.jurors import pool_judgements
from ray_pipeline.agents.jury import PoolRule
from ray_pipeline.agents.strategies import Judgement, Strategy, StrategyAsking, decide, load_strategy_templates, vote
from ray_pipeline.agents.templates import Layout, load_templates
from ray_pipeline.api.engines import bound, templates_of
from ray_pipeline.api.frames import Frame, column_names, give, need, rows_with_ids, table_of
from ray_pipeline.api.loop import gather, wait_for
from ray_pipeline.config.settings import Settings, refuse_repeated
from ray_pipeline.engines.base import ChatEngine, Completion
from ray_pipeline.store.keys import derived_seed
from ray_pipeline.store.schemas import CRITIQUES, VERDICTS, to_table

S = TypeVar("S", bound=Settings)
T = TypeVar("T")

#: Calls in flight, unless a function is given another number; an endpoint has limits of its own as well.
CONCURRENCY = 256

#: What replies of the pocket world's models fit in; other models have the defaults of the settings.
_POCKET: dict[str, dict[str, Any]] = {
    "sampling": {"max_tokens": 64},
    "asking": {"reason_chars": 200},
    "review": {"reason_chars": 200, "feedback_chars": 200},
    "answer": {"max_tokens": 48},
    "strategy": {"reason_chars": 80},
    "strategy_sampling": {"max_tokens": 120},
    "debate": {"speech": {"max_tokens": 40}},
}

#: Rows of `compare`, `debate` and `jury`: one a pair of responses. Scores are null for a direct comparison, the vote is
#: null when a part of the judgement was not read.
BALLOTS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        ("score_a", pa.float64()),
        ("score_b", pa.float64()),
        ("vote", pa.string()),
        ("flipped", pa.bool_()),
        ("reason", pa.string()),
        pa.field("parse_status", pa.string(), nullable=False),
    ]
)


def judge(
    frame: Frame,
    engine: ChatEngine,
    rubrics: Sequence[Rubric | Mapping[str, Any] | str] | Mapping[str, str] | None = None,
    *,
    templates: str | None = None,
    layout: Layout = "shared_first",
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    asking: JudgeAsking | Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Score every response on every rubric.

    Args:
        frame: columns `prompt` (text, or messages with role and content; also as `messages`) and `response` (text;
            null is judged by nobody), and if you have them `prompt_id` and `candidate_id`.
        engine: from `open_engine`, or any `ChatEngine`.
        rubrics: `Rubric`s or their keys (`{"name": "safety", "text": "…", "low": 1, "high": 10}`), names alone, or
            name → text; default: helpfulness, factuality and conciseness as published.
        templates: built-in name or YAML file of the judge's prompt; default: what the engine's model understands.
        sampling, asking: as the keys of the same name in the `judge` block (`{"max_tokens": 512}`, `{"retries": 2}`).
        concurrency: maximum number of responses and rubrics in work at once.

    Returns:
        Rows × rubrics verdicts: candidate_id, prompt_id, judge, score (float; null when unread), expected_score,
        reason, parse_status (ok, repaired, unparsed, truncated, too_long, error) and raw, by row and rubric.

    Raises:
        ColumnError: `prompt` or `response` is missing.
        ValueError: a rubric or a setting is wrong.
    """
    found = _rubrics(rubrics)
    name = templates_of(engine, templates)
    template = load_templates(name).judge
    how = _settings(SamplingSettings, sampling, name, "sampling"), _settings(JudgeAsking, asking, name, "asking")
    rows = rows_with_ids(frame, "candidate_id", ["response"], "frame")

    async def one(row: Mapping[str, Any], rubric: Rubric) -> dict[str, Any]:
        if row["response"] is None:
            verdict = judges.Verdict(None, None, None, "error", None)
        else:
            own = bound(engine, row["prompt_id"], f"judge/{rubric.name}")
            verdict = await judges.judge(own, row["messages"], row["response"], rubric, template, *how, layout)
        return {**_ids(row, "candidate_id"), "judge": rubric.name, **dataclasses.asdict(verdict)}

    made = _each([(row, rubric) for row in rows for rubric in found], one, concurrency)
    return give(to_table(made, VERDICTS), frame)


def critique(
    frame: Frame,
    engine: ChatEngine,
    *,
    templates: str | None = None,
    layout: Layout | None = None,
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    asking: JudgeAsking | Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Say of every response whether the way to it is flawed, and how.

    Args:
        frame, engine, templates, sampling, asking, concurrency: as for `judge`.

    Returns:
        One critique a row, in the frame's order and with its index: candidate_id, prompt_id, flawed (bool; null when
        unread), failure_type (circular, unsupported, contradictory, unspecified, none), reason, parse_status, raw.

    Raises:
        ColumnError, ValueError: as `judge`.
    """
    name = templates_of(engine, templates)
    template = load_templates(name).critic
    # The pocket's critic was trained on one layout; with one call a candidate, others share the rubric alone.
    order: Layout = layout or ("shared_first" if name == "pocket" else "rubric_first")
    how = _settings(SamplingSettings, sampling, name, "sampling"), _settings(JudgeAsking, asking, name, "asking")
    rows = rows_with_ids(frame, "candidate_id", ["response"], "frame")

    async def one(row: Mapping[str, Any]) -> dict[str, Any]:
        if row["response"] is None:
            found = judges.Critique(None, None, None, "error", None)
        else:
            own = bound(engine, row["prompt_id"], "critic")
            found = await judges.critique(own, row["messages"], row["response"], template, *how, order)
        return {**_ids(row, "candidate_id"), **dataclasses.asdict(found)}

    return give(to_table(_each([(row,) for row in rows], one, concurrency), CRITIQUES), frame, same_rows=True)


def compare(
    frame: Frame,
    engine: ChatEngine,
    strategy: Strategy | Mapping[str, Any] | str = "direct",
    *,
    templates: str | None = None,
    layout: Layout = "shared_first",
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    asking: StrategyAsking | Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Compare two responses to each prompt.

    Args:
        frame: columns `prompt` (or `messages`), `response_a` and `response_b`, and if you have it `pair_id`.
        strategy: direct (which is better; in both orders, and where they differ it is a tie), independent (a score for
            each alone), combined (scores side by side), the keys of a `Strategy`
            (`{"kind": "combined", "high": 100, "orders": "both"}`), or a file that registers a strategy.
        templates: built-in name or YAML file of the strategies' prompts.
        engine, sampling, asking, concurrency: as for `judge`.

    Returns:
        One row a pair, in the frame's order and with its index: pair_id, prompt_id, score_a, score_b (null for a direct
        comparison), vote ("A", "B", "tie"; null when unread), flipped (whether the two orders name different winners),
        reason, parse_status.

    Raises:
        ColumnError, ValueError: as `judge`.
    """
    found = _strategy(strategy)
    name = templates_of(engine, templates)
    texts = load_strategy_templates(name)
    how = (
        _settings(SamplingSettings, sampling, name, "strategy_sampling"),
        _settings(StrategyAsking, asking, name, "strategy"),
    )

    async def one(row: Mapping[str, Any]) -> dict[str, Any]:
        own = bound(engine, row["prompt_id"], f"compare/{found.name}")
        answers = [row["response_a"], row["response_b"]]
        return _ballot(row, await decide(own, row["messages"], answers, found, texts, *how, layout))

    return give(_ballots(_each([(row,) for row in _pairs(frame)], one, concurrency)), frame, same_rows=True)


def debate(
    frame: Frame,
    engines: ChatEngine | Mapping[str, ChatEngine],
    *,
    templates: str | None = None,
    settings: debates.DebateSettings | Mapping[str, Any] | None = None,
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    asking: StrategyAsking | Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Let the roles of a debate discuss two responses to each prompt, and score them (Chan et al. 2023, "ChatEval").

    Args:
        frame: as for `compare`.
        engines: one for all roles, or role → engine.
        templates: built-in name or YAML file of roles and prompts.
        settings: rules of the debate (`{"rounds": 2, "pool": "mean"}`).
        sampling, asking: of the final scores, as for `compare`.

    Returns:
        The columns of `compare`, and `speeches`: what was said, a list of structs (order, round, position, role, text,
        finish_reason).

    Raises:
        ColumnError, ValueError: as `judge`; a role without an engine.
    """
    first = next(iter(engines.values())) if isinstance(engines, Mapping) else engines
    name = templates_of(first, templates)
    texts = debates.load_debate_templates(name)
    by_role = engines if isinstance(engines, Mapping) else {role.name: engines for role in texts.roles}
    rules = _settings(debates.DebateSettings, settings, name, "debate")
    how = (
        _settings(SamplingSettings, sampling, name, "strategy_sampling"),
        _settings(StrategyAsking, asking, name, "strategy"),
    )

    async def one(row: Mapping[str, Any]) -> dict[str, Any]:
        own = {role: bound(engine, row["prompt_id"], f"debate/{role}") for role, engine in by_role.items()}
        answers = [row["response_a"], row["response_b"]]
        held = await debates.debate(own, row["messages"], answers, texts, rules, *how)
        speeches = [{**dataclasses.asdict(s), "order": "ba" if s.order == (1, 0) else "ab"} for s in held.speeches]
        return {**_ballot(row, held.judgement), "speeches": speeches}

    made = _each([(row,) for row in _pairs(frame)], one, concurrency)
    speech = {name: pa.string() for name in ("order", "role", "text", "finish_reason")}
    spoken = pa.list_(pa.struct({**speech, "round": pa.int32(), "position": pa.int32()}))
    table = _ballots(made).append_column("speeches", pa.array([row["speeches"] for row in made], spoken))
    return give(table, frame, same_rows=True)


def jury(judgements: Mapping[str, Frame], pool: PoolRule = "mode", weights: Mapping[str, float] | None = None) -> Frame:
    """Pool what several judges say of the same pairs.

    Args:
        judgements: judge → its rows of `compare` or `debate`; pairs are joined by pair_id, and a judge without a vote
            on a pair abstains.
        pool: mode (most frequent vote if it is the only one, else a tie), weighted; of scores: mean, median,
            weighted_mean.
        weights: judge → weight, for the two weighted rules.

    Returns:
        One row a pair in the order of the first judge, with the columns of `compare`.

    Raises:
        ColumnError: a frame is not one of `compare`.
        ValueError: there are no judges, a weight is missing, or a rule that pools scores gets none.
    """
    if not judgements:
        raise ValueError("a jury needs one or more judges")
    if pool in ("weighted", "weighted_mean") and set(weights or ()) != set(judgements):
        raise ValueError(f"pool {pool} needs weights, one for each of {', '.join(judgements)}")
    pairs: dict[str, dict[str, Any]] = {}
    said: dict[str, dict[str, Judgement]] = {}
    for name, frame in judgements.items():
        columns = ["pair_id", "prompt_id", "score_a", "score_b", "vote", "parse_status"]
        for row in table_of(frame, columns, f"judgements of {name}", BALLOTS).to_pylist():
            pairs.setdefault(row["pair_id"], row)
            said.setdefault(row["pair_id"], {})[name] = _judgement(row)
    made = [_ballot(row, pool_judgements(said[pair], pool, weights)) for pair, row in pairs.items()]
    return give(_ballots(made), next(iter(judgements.values())))


def feedback_loop(
    frame: Frame,
    generator: ChatEngine,
    reviewers: ChatEngine | Mapping[str, ChatEngine] | None = None,
    *,
    responses: int = 3,
    templates: str | None = None,
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    reviewing: SamplingSettings | Mapping[str, Any] | None = None,
    asking: loops.ReviewAsking | Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Answer each prompt, review the answer, and revise it by the reviews until there is nothing to improve.

    Args:
        frame: column `prompt` (or `messages`).
        generator: answers and revises.
        reviewers: one, or name → engine; default: the generator.
        responses: maximum number of responses to a prompt; one fewer are reviewed.
        templates: built-in name or YAML file of the prompts for reviews and revisions.
        sampling, reviewing: how responses and reviews are drawn.
        asking: keys of a `ReviewAsking` (`{"retries": 2, "scored": True}`).

    Returns:
        One row a response, first to last: candidate_id, prompt_id, prompt, k (0 is the first), response, finish_reason,
        reviews (list of structs reviewer, feedback, score, parse_status; empty for the last) and stop (why the loop
        ended, on its last row: limit, empty, repeated, unread, no_response). `judge` and `gate` take it as it is.

    Raises:
        ColumnError, ValueError: as `judge`.
    """
    name = templates_of(generator, templates)
    texts = loops.load_feedback_templates(name)
    answer = _settings(SamplingSettings, sampling, name, "answer")
    how = _settings(SamplingSettings, reviewing, name, "sampling")
    rules = _settings(loops.ReviewAsking, asking, name, "review")
    if reviewers is None:
        reviewers = generator
    by_name = reviewers if isinstance(reviewers, Mapping) else {"reviewer": reviewers}
    column = "messages" if "messages" in column_names(frame, "frame") else "prompt"
    need(frame, [column], "frame")
    rows = rows_with_ids(frame, "row_id", [], "frame")

    async def one(row: Mapping[str, Any]) -> list[dict[str, Any]]:
        pid = row["prompt_id"]
        looking = {n: loops.Reviewer(bound(e, pid, f"review/{n}"), how) for n, e in by_name.items()}
        drawn = [
            answer.sampling(seed=derived_seed("loop", pid, k) if answer.temperature > 0 else None)
            for k in range(responses)
        ]
        own = bound(generator, pid, "generator")
        loop = await loops.feedback_loop(own, looking, row["messages"], responses, texts, drawn.__getitem__, rules)
        return _loop_rows(row, loop)

    made = [row for loop in _each([(row,) for row in rows], one, concurrency) for row in loop]
    return give(pa.Table.from_pylist(made, schema=_LOOP), frame)


_REVIEW = pa.struct(
    [("reviewer", pa.string()), ("feedback", pa.string()), ("score", pa.float64()), ("parse_status", pa.string())]
)
_LOOP = pa.schema(
    [
        ("candidate_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("k", pa.int32()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),
        ("reviews", pa.list_(_REVIEW)),
        ("stop", pa.string()),
    ]
)


def _loop_rows(row: Mapping[str, Any], loop: loops.Loop) -> list[dict[str, Any]]:
    given: list[Completion | None] = list(loop.responses)
    if loop.stop == "no_response":
        given.append(None)
    rows = []
    for k, reply in enumerate(given):
        said = loop.reviews[k] if k < len(loop.reviews) else {}
        reviews = [
            {"reviewer": n, "feedback": r.feedback, "score": r.score, "parse_status": r.parse_status}
            for n, r in said.items()
        ]
        rows.append(
            {
                "candidate_id": f"{row['row_id']}-{k}",
                "prompt_id": row["prompt_id"],
                "prompt": row["messages"],
                "k": k,
                "response": None if reply is None else reply.text,
                "finish_reason": "error" if reply is None else reply.finish_reason,
                "reviews": reviews,
                "stop": loop.stop if k == len(given) - 1 else None,
            }
        )
    return rows


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings(kind: type[S], given: S | Mapping[str, Any] | None, templates: str, role: str) -> S:
    """A block of settings: as given, or the caller's keys over the defaults of the model's world."""
    if isinstance(given, kind):
        return given
    defaults = _POCKET[role] if templates == "pocket" and role in _POCKET else {}
    return kind.model_validate({**defaults, **dict(given or {})})


def _rubrics(given: Sequence[Rubric | Mapping[str, Any] | str] | Mapping[str, str] | None) -> list[Rubric]:
    published = _published_rubrics()
    if given is None:
        return list(published.values())
    if isinstance(given, Mapping):
        given = [{"name": name, "text": text} for name, text in given.items()]
    if isinstance(given, str) or not given:
        raise ValueError("rubrics is a list of rubrics (or name → text) with at least one of them")
    found = []
    for rubric in given:
        if isinstance(rubric, str):
            rubric = published.get(rubric) or Rubric(name=rubric)
        found.append(rubric if isinstance(rubric, Rubric) else Rubric.model_validate(dict(rubric)))
    refuse_repeated((rubric.name for rubric in found), "rubrics")
    return found


def _published_rubrics() -> dict[str, Rubric]:
    """Those of the shipped configuration of DMAPO, where their texts are."""
    import importlib.resources

    text = (importlib.resources.files("configs") / "dmapo.yaml").read_text("utf-8")
    return {r["name"]: Rubric.model_validate(r) for r in yaml.safe_load(text)["judge"]["rubrics"]}


def _strategy(given: Strategy | Mapping[str, Any] | str) -> Strategy:
    if isinstance(given, Strategy):
        return given
    if isinstance(given, Mapping):
        return Strategy.model_validate(dict(given))
    return Strategy.model_validate({"kind": given, **({} if given == "independent" else {"orders": "both"})})


# --- rows -------------------------------------------------------------------------------------------------------------


def _each(items: Sequence[tuple[Any, ...]], one: Callable[..., Coroutine[Any, Any, T]], concurrency: int) -> list[T]:
    return wait_for(gather([lambda item=item: one(*item) for item in items], concurrency))  # type: ignore[misc]


def _ids(row: Mapping[str, Any], key: str) -> dict[str, str]:
    return {key: row[key], "prompt_id": row["prompt_id"]}


def _pairs(frame: Any) -> list[dict[str, Any]]:
    rows = rows_with_ids(frame, "pair_id", ["response_a", "response_b"], "frame")
    for number, row in enumerate(rows):
        for side in ("response_a", "response_b"):
            if row[side] is None:
                raise ValueError(f"frame, row {number}: {side} is empty; drop the row")
    return rows


def _ballot(row: Mapping[str, Any], judgement: Judgement) -> dict[str, Any]:
    a, b = judgement.scores or (None, None)
    reasons = [look.reason for look in judgement.looks if look.reason]
    return {
        **_ids(row, "pair_id"),
        "score_a": a,
        "score_b": b,
        "vote": vote(judgement.best),
        "flipped": judgement.flipped,
        "reason": "\n\n".join(reasons) or None,
        "parse_status": judgement.parse_status,
    }


def _judgement(row: Mapping[str, Any]) -> Judgement:
    """A judgement as a row of `compare` holds it."""
    best = {"A": (0,), "B": (1,), "tie": (0, 1), None: ()}[row["vote"]]
    scores = None if row["score_a"] is None or row["score_b"] is None else (row["score_a"], row["score_b"])
    return Judgement(scores, best, row["parse_status"], ())


def _ballots(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return to_table([{name: row[name] for name in BALLOTS.names} for row in rows], BALLOTS)
