"""The protocol of a score, and the name that the score may therefore have.

A score has the benchmark's own name only if its protocol equals the published one in every field that the benchmark
fixes; any other score is described: "AlpacaEval-2-style LC, judge X, reference Y".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ray_pipeline.store.keys import canonical_json, digest


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that two scores must share to be comparable. None where the benchmark has no such part.

    Attributes:
        benchmark: "AlpacaEval 2", "MT-Bench", "IFEval"; "win rate" for Quorum's own measure.
        metric: published name of the figure ("LC", "WR", …); "" where the benchmark has only one.
        questions: digest of all questions.
        judge: identity of the judging model.
        judge_prompts: digest of the judge's prompts.
        judge_sampling: sampling of its replies, as canonical JSON.
        reading: how its replies are parsed into verdicts.
        order: order or orders in which two answers are shown.
        reference: name of the reference model or answers.
        reference_answers: digest of those answers.
        estimator: how the figure is computed from the verdicts.
        checker: program and versions, where no model judges.
        answers: sampling of the answers, as canonical JSON; ignored for benchmarks that do not fix it.
    """

    benchmark: str
    metric: str = ""
    questions: str | None = None
    judge: str | None = None
    judge_prompts: str | None = None
    judge_sampling: str | None = None
    reading: str | None = None
    order: str | None = None
    reference: str | None = None
    reference_answers: str | None = None
    estimator: str | None = None
    checker: str | None = None
    answers: str | None = None

    def fingerprint(self) -> str:
        """16 hex digits, equal exactly when all fields are equal."""
        return digest(["protocol", dataclasses.asdict(self)], size=8)


@dataclasses.dataclass(frozen=True)
class PublishedProtocol:
    """The protocol of a benchmark's published scores, and the fields that the benchmark leaves open."""

    protocol: Protocol
    open_fields: frozenset[str] = frozenset()

    def departures(self, measured: Protocol) -> tuple[str, ...]:
        """Names of the fields in which a measurement differs from the published protocol."""
        return tuple(
            field.name
            for field in dataclasses.fields(Protocol)
            if field.name not in self.open_fields
            and getattr(measured, field.name) != getattr(self.protocol, field.name)
        )


@dataclasses.dataclass(frozen=True)
class ScoreName:
    """The name of a score, the fields that differ from the published protocol, and the fingerprint."""

    text: str
    departures: tuple[str, ...]
    fingerprint: str

    @property
    def exact(self) -> bool:
        return not self.departures


def score_name(measured: Protocol, published: PublishedProtocol | None) -> ScoreName:
    """The name of a score; without a published protocol it is never the benchmark's own."""
    departures = ("published protocol",) if published is None else published.departures(measured)
    metric = f" {measured.metric}" if measured.metric else ""
    if not departures:
        text = f"{measured.benchmark}{metric}"
    else:
        parts = [f"{measured.benchmark.replace(' ', '-')}-style{metric}"]
        parts += [f"judge {short_name(measured.judge)}"] if measured.judge else []
        if measured.reference:
            parts += [f"reference {short_name(measured.reference)}"]
        elif "reference" in departures:
            parts += ["no reference"]
        parts += [f"checker {measured.checker}"] if measured.checker and "checker" in departures else []
        text = ", ".join(parts)
    return ScoreName(text, departures, measured.fingerprint())


@dataclasses.dataclass(frozen=True)
class Measured:
    """The protocol of one of Quorum's own figures, which has no published counterpart."""

    name: str
    fingerprint: str
    protocol: Protocol


def measured_by(protocol: Protocol) -> Measured:
    """A protocol with its fingerprint and a readable name: "win rate, judge X, reference Y"."""
    parts = [" ".join(part for part in (protocol.benchmark, protocol.metric) if part)]
    parts += [f"judge {short_name(protocol.judge)}"] if protocol.judge else []
    parts += [f"reference {short_name(protocol.reference)}"] if protocol.reference else []
    return Measured(", ".join(parts), protocol.fingerprint(), protocol)


def fixed_fields(protocol: Protocol) -> dict[str, str]:
    """The fields that a protocol fixes, in order, without empty ones."""
    return {name: str(value) for name, value in dataclasses.asdict(protocol).items() if value}


def short_name(identity: str) -> str:
    """A readable form of a model's identity: an endpoint without its address, a Hub model with a short commit hash."""
    if match := re.fullmatch(r"endpoint:(.+?)@https?://.*", identity):
        return match[1]
    if match := re.fullmatch(r"hub:(.+)@([0-9a-f]{7})[0-9a-f]*", identity):
        return f"{match[1]}@{match[2]}"
    if match := re.fullmatch(r"sha256:([0-9a-f]{12})[0-9a-f]*", identity):
        return f"weights {match[1]}"
    return identity


def win_rate_by(
    weights: Mapping[str, str], engine: Mapping[str, Any], settings: Mapping[str, Any], **other: Any
) -> Protocol:
    """A win rate's protocol, as far as it is known before the first call.

    Args:
        weights, engine: identity of the judging model (`ModelSettings.weights`, `.semantics`).
        settings: sampling of its replies.
        other: further fields of Protocol.
    """
    # Whatever else affects the judge's replies (adapter, chat template, engine) has no field of its own.
    setup = {name: value for name, value in weights.items() if name != "model"} | {"engine": engine}
    drawn = f"{settings_text(**settings)} {canonical_json(setup)}"
    return Protocol("win rate", judge=weights.get("model"), judge_sampling=drawn, **other)


def settings_text(**settings: Any) -> str:
    """Settings as text for a protocol field; equal settings give equal text."""
    return canonical_json({k: float(v) if type(v) is int else v for k, v in settings.items()})
