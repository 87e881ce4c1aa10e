"""Comparisons, debates and juries on the pairs of responses of a frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_pipeline.agents import debate as debates
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.jurors import pool_judgements
from ray_pipeline.agents.jury import PoolRule
from ray_pipeline.agents.strategies import Judgement, Strategy, StrategyAsking, decide, load_strategy_templates, vote
from ray_pipeline.agents.templates import Layout
from ray_pipeline.api.calls import CONCURRENCY, each, ids_of, settings_of
from ray_pipeline.api.engines import bound, templates_of
from ray_pipeline.api.frames import Frame, give, rows_with_ids, table_of
from ray_pipeline.data.sources.records import Thoughts
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.store.schemas import to_table

#: Rows of `compare`, `debate` and `jury`: one for each pair of responses. Scores are null for a direct comparison; the
#: vote is null when a part of the judgement is unread.
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


def compare(
    frame: Frame,
    engine: ChatEngine,
    strategy: Strategy | Mapping[str, Any] | str = "direct",
    *,
    templates: str | None = None,
    layout: Layout = "shared_first",
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    asking: StrategyAsking | Mapping[str, Any] | None = None,
    thoughts: Thoughts = "split",
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Compare two responses to each prompt.

    Args:
        frame: columns `prompt` (or `messages`), `response_a` and `response_b`; optional: `pair_id`.
        strategy: direct (which is better; in both orders, a tie where they disagree), independent (each is scored
            alone), combined (both are scored side by side), the keys of a `Strategy`
            (`{"kind": "combined", "high": 100, "orders": "both"}`), or a file that registers a strategy.
        templates: built-in name or YAML file of the strategies' prompts.
        engine, sampling, asking, thoughts, concurrency: as for `judge`.

    Returns:
        One row for each pair, in the frame's order and with its index: pair_id, prompt_id, score_a, score_b (null for a
        direct comparison), vote ("A", "B", "tie"; null when unread), flipped (whether the two orders have different
        winners), reason, parse_status.

    Raises:
        ColumnError, ValueError: as `judge`.
    """
    found = _strategy(strategy)
    name = templates_of(engine, templates)
    texts = load_strategy_templates(name)
    how = (
        settings_of(SamplingSettings, sampling, name, "strategy_sampling"),
        settings_of(StrategyAsking, asking, name, "strategy"),
    )

    async def one(row: Mapping[str, Any]) -> dict[str, Any]:
        own = bound(engine, row["prompt_id"], f"compare/{found.name}")
        answers = [row["response_a"], row["response_b"]]
        return _ballot(row, await decide(own, row["messages"], answers, found, texts, *how, layout))

    return give(_ballots(each([(row,) for row in _pairs(frame, thoughts)], one, concurrency)), frame, same_rows=True)


def debate(
    frame: Frame,
    engines: ChatEngine | Mapping[str, ChatEngine],
    *,
    templates: str | None = None,
    settings: debates.DebateSettings | Mapping[str, Any] | None = None,
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    asking: StrategyAsking | Mapping[str, Any] | None = None,
    thoughts: Thoughts = "split",
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Let the roles of a debate discuss two responses to each prompt, and score them (Chan et al. 2023, "ChatEval").

    Args:
        frame: as for `compare`.
        engines: one for all roles, or role → engine.
        templates: built-in name or YAML file of roles and prompts.
        settings: rules of the debate (`{"rounds": 2, "pool": "mean"}`).
        sampling, asking: of the final scores, as for `compare`.
        thoughts: as for `judge`.

    Returns:
        The columns of `compare`, and `speeches`: a list of structs (order, round, position, role, text,
        finish_reason, error).

    Raises:
        ColumnError, ValueError: as `judge`; a role without an engine.
    """
    first = next(iter(engines.values())) if isinstance(engines, Mapping) else engines
    name = templates_of(first, templates)
    texts = debates.load_debate_templates(name)
    by_role = engines if isinstance(engines, Mapping) else {role.name: engines for role in texts.roles}
    rules = settings_of(debates.DebateSettings, settings, name, "debate")
    how = (
        settings_of(SamplingSettings, sampling, name, "strategy_sampling"),
        settings_of(StrategyAsking, asking, name, "strategy"),
    )

    async def one(row: Mapping[str, Any]) -> dict[str, Any]:
        own = {role: bound(engine, row["prompt_id"], f"debate/{role}") for role, engine in by_role.items()}
        answers = [row["response_a"], row["response_b"]]
        held = await debates.debate(own, row["messages"], answers, texts, rules, *how)
        speeches = [{**dataclasses.asdict(s), "order": "ba" if s.order == (1, 0) else "ab"} for s in held.speeches]
        return {**_ballot(row, held.judgement), "speeches": speeches}

    made = each([(row,) for row in _pairs(frame, thoughts)], one, concurrency)
    speech = {name: pa.string() for name in ("order", "role", "text", "finish_reason", "error")}
    spoken = pa.list_(pa.struct({**speech, "round": pa.int32(), "position": pa.int32()}))
    table = _ballots(made).append_column("speeches", pa.array([row["speeches"] for row in made], spoken))
    return give(table, frame, same_rows=True)


def jury(judgements: Mapping[str, Frame], pool: PoolRule = "mode", weights: Mapping[str, float] | None = None) -> Frame:
    """Pool several judges' verdicts on the same pairs.

    Args:
        judgements: judge → its rows from `compare` or `debate`; pairs are joined by pair_id, and a judge without a
            vote on a pair abstains.
        pool: mode (the most frequent vote if it is unique, else a tie), weighted; for scores: mean, median,
            weighted_mean.
        weights: judge → weight, for weighted and weighted_mean.

    Returns:
        One row for each pair, in the order of the first judge, with the columns of `compare`.

    Raises:
        ColumnError: a frame lacks a column of `compare`.
        ValueError: no judges, a weight is missing, or a rule that pools scores meets a judge without scores.
    """
    if not judgements:
        raise ValueError("judgements is empty; a jury needs at least one judge")
    if pool in ("weighted", "weighted_mean") and set(weights or ()) != set(judgements):
        raise ValueError(f"pool {pool} needs weights; set one for each of {', '.join(judgements)}")
    pairs: dict[str, dict[str, Any]] = {}
    said: dict[str, dict[str, Judgement]] = {}
    for name, frame in judgements.items():
        columns = ["pair_id", "prompt_id", "score_a", "score_b", "vote", "parse_status"]
        for row in table_of(frame, columns, f"judgements of {name}", BALLOTS).to_pylist():
            pairs.setdefault(row["pair_id"], row)
            said.setdefault(row["pair_id"], {})[name] = _judgement(row)
    made = [_ballot(row, pool_judgements(said[pair], pool, weights)) for pair, row in pairs.items()]
    return give(_ballots(made), next(iter(judgements.values())))


def _strategy(given: Strategy | Mapping[str, Any] | str) -> Strategy:
    if isinstance(given, Strategy):
        return given
    if isinstance(given, Mapping):
        return Strategy.model_validate(dict(given))
    return Strategy.model_validate({"kind": given, **({} if given == "independent" else {"orders": "both"})})


def _pairs(frame: Any, thoughts: Thoughts) -> list[dict[str, Any]]:
    rows = rows_with_ids(frame, "pair_id", ["response_a", "response_b"], "frame", thoughts=thoughts)
    for number, row in enumerate(rows):
        for side in ("response_a", "response_b"):
            if row[side] is None:
                raise ValueError(f"frame, row {number}: {side} is null, or ends within its thoughts; drop the row")
    return rows


def _ballot(row: Mapping[str, Any], judgement: Judgement) -> dict[str, Any]:
    a, b = judgement.scores or (None, None)
    reasons = [look.reason for look in judgement.looks if look.reason]
    return {
        **ids_of(row, "pair_id"),
        "score_a": a,
        "score_b": b,
        "vote": vote(judgement.best),
        "flipped": judgement.flipped,
        "reason": "\n\n".join(reasons) or None,
        "parse_status": judgement.parse_status,
    }


def _judgement(row: Mapping[str, Any]) -> Judgement:
    """The judgement in a row of `compare`."""
    best = {"A": (0,), "B": (1,), "tie": (0, 1), None: ()}[row["vote"]]
    scores = None if row["score_a"] is None or row["score_b"] is None else (row["score_a"], row["score_b"])
    return Judgement(scores, best, row["parse_status"], ())


def _ballots(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return to_table([{name: row[name] for name in BALLOTS.names} for row in rows], BALLOTS)
