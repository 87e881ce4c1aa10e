"""The posteriors of a gate with a pool, written again for the audit, independently of `data/posterior_gate.py` and of
the models in `stats/`.

Row by row, Bayes' rule with the stored model gives the posterior. After the last row, one step of EM over all rows must
leave the stored model as it is, and groups of judges and the power of the likelihood must follow from the votes.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_pipeline.audit.findings import Row
from ray_pipeline.audit.formulas import close
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.store.keys import unit_hash

_CLASSES = ("undesirable", "discard", "desirable")
#: Judges with a higher kappa are one.
_ONE = 0.98
#: How far a step of EM may move a probability of a model that has converged.
_STEP = 1e-5
#: With fewer judges, one accuracy is that of all.
_FEWEST = 3

Votes = tuple[int | None, ...]


def in_slice(candidate_id: str) -> bool:
    """Whether a candidate goes through all levels of judges."""
    return unit_hash("audit slice", candidate_id) < 0.05


def posterior_label(decision: Row, gate: GateConfig) -> str:
    """The label that follows from the stored posterior and penalty of a complete candidate."""
    p = {name: decision[f"posterior_{name}"] for name in _CLASSES}
    if p["undesirable"] >= gate.posterior_at:
        return "undesirable"
    if p["desirable"] * (1.0 - decision["penalty"]) >= gate.posterior_at:
        return "desirable"
    return "discard" if max(p["desirable"], p["discard"]) >= gate.posterior_at else "abstain"


class PosteriorCheck:
    """The posterior of each row of scores, and at the end the model.

    Args:
        facts: what the gate's stage stored about the model.
        judges: in the order of the scores.
        skipped: not every judge was asked about every candidate: groups of judges and the power follow from the audit
            slice, on which all were.
    """

    def __init__(
        self, facts: Mapping[str, Any], judges: Sequence[str], gate: GateConfig, *, skipped: bool = False
    ) -> None:
        self._facts, self._judges, self._gate, self._skipped = facts, list(judges), gate, skipped
        self._groups = [[self._judges.index(name) for name in group] for group in facts["groups"]]
        self._seen: collections.Counter[Votes] = collections.Counter()
        self._whole: collections.Counter[Votes] = collections.Counter()
        self._posterior = functools.lru_cache(maxsize=1 << 16)(self._bayes)

    @property
    def one(self) -> bool:
        """Whether all judges count as one."""
        return len(self._groups) == 1

    def expected(self, name: str, scores: Sequence[float | None]) -> dict[str, float | None]:
        """Column → posterior of a candidate; None without any vote. The candidate counts for the model."""
        low, high = self._gate.undesirable_at, self._gate.desirable_at
        votes = tuple(None if s is None else 0 if s <= low else 2 if s >= high else 1 for s in scores)
        self._seen[votes] += 1
        if not self._skipped or in_slice(name):
            self._whole[votes] += 1
        found = self._posterior(self._merged(votes), self._facts["power"])
        return {f"posterior_{name}": None if found is None else found[place] for place, name in enumerate(_CLASSES)}

    def _merged(self, votes: Votes) -> Votes:
        return tuple(next((votes[j] for j in group if votes[j] is not None), None) for group in self._groups)

    def _bayes(self, votes: Votes, power: float) -> list[float] | None:
        if all(vote is None for vote in votes):
            return None
        tables = self._facts["errors"]
        logs = [
            math.log(prior)
            + power * sum(math.log(errors[v][c]) for errors, v in zip(tables, votes, strict=True) if v is not None)
            for c, prior in enumerate(self._facts["prior"])
        ]
        weights = [math.exp(log - max(logs)) for log in logs]
        return [weight / sum(weights) for weight in weights]

    def problems(self) -> Iterator[str]:
        """What of the stored model does not follow from the votes of all rows."""
        if (groups := self._nearly_one()) != self._groups:
            shown = [[self._judges[j] for j in group] for group in groups]
            yield f"judges that count as one are {self._facts['groups']}, should be {shown}"
        if not (known := self._known(self._seen)):
            return
        total = sum(count for _, count, _ in known)
        for c, stored in enumerate(self._facts["prior"]):
            share = sum(count * p[c] for _, count, p in known) / total
            if abs(share - stored) > _STEP:
                yield f"the prior of {_CLASSES[c]} is {stored}, should be {share}"
        places = range(len(self._groups))
        own = [[(votes[place], count, p) for votes, count, p in known if votes[place] is not None] for place in places]
        for place, group in enumerate(self._facts["groups"]):
            alike = len(places) < _FEWEST  # nothing shows who of two is right
            found = self._table([vote for votes in own for vote in votes] if alike else own[place], alike)
            pairs = zip(itertools.chain(*self._facts["errors"][place]), itertools.chain(*found), strict=True)
            if any(abs(stored - expected) > _STEP for stored, expected in pairs):
                yield f"the errors of {group[0]} are {self._facts['errors'][place]}, should be {found}"
        if not close(self._facts["power"], power := self._power(self._known(self._whole))):
            yield f"the power of the likelihood is {self._facts['power']}, should be {power}"

    def _known(self, seen: Mapping[Votes, int]) -> list[tuple[Votes, int, list[float]]]:
        """Votes of groups, how often they occur, and the posterior with the plain likelihood; without empty ones."""
        rows: collections.Counter[Votes] = collections.Counter()
        for votes, count in seen.items():
            rows[self._merged(votes)] += count
        return [(votes, count, p) for votes, count in rows.items() if (p := self._posterior(votes, 1.0)) is not None]

    def _table(self, own: Sequence[tuple[int | None, int, list[float]]], alike: bool) -> list[list[float]]:
        """Probability of each vote (rows) given each class (columns), from the expected counts of a judge."""
        size = range(len(_CLASSES))
        counts = [[sum(n * p[c] for vote, n, p in own if vote == v) for c in size] for v in size]
        if alike or self._gate.pool == "one_coin":
            total = sum(map(sum, counts))
            right = sum(counts[c][c] for c in size) / total if total else 1 / len(size)
            return [[right if v == c else (1 - right) / (len(size) - 1) for c in size] for v in size]
        columns = [max(sum(counts[v][c] for v in size), 1e-10) for c in size]
        return [[counts[v][c] / columns[c] for c in size] for v in size]

    def _power(self, known: Sequence[tuple[Votes, int, list[float]]]) -> float:
        """n_eff / n at the mean correlation of errors over the pairs that have one, if it is positive."""
        found = []
        for a, b in itertools.combinations(range(len(self._groups)), 2):
            n = wrong_a = wrong_b = both = 0.0
            for votes, count, p in known:
                if (va := votes[a]) is None or (vb := votes[b]) is None:
                    continue
                n += count
                wrong_a += count * (1 - p[va])
                wrong_b += count * (1 - p[vb])
                both += count * (1 - p[va] - p[vb] + (p[va] if va == vb else 0.0))
            spread = wrong_a * (n - wrong_a) * wrong_b * (n - wrong_b)
            if spread > 1e-9 * max(n, 1.0):
                found.append((n * both - wrong_a * wrong_b) / math.sqrt(spread))
        mean = max(0.0, sum(found) / len(found)) if found else 0.0
        return 1 / (1 + (len(self._groups) - 1) * mean)

    def _nearly_one(self) -> list[list[int]]:
        groups: list[list[int]] = []
        for judge in range(len(self._judges)):
            like = next((group for group in groups if self._kappa(group[0], judge) > _ONE), None)
            if like is None:
                groups.append([judge])
            else:
                like.append(judge)
        return groups

    def _kappa(self, a: int, b: int) -> float:
        """Cohen's kappa over the rows on which both voted; 0 where it is undefined."""
        table: collections.Counter[tuple[int, int]] = collections.Counter()
        for votes, count in self._whole.items():
            va, vb = votes[a], votes[b]
            if va is not None and vb is not None:
                table[va, vb] += count
        total, size = sum(table.values()), range(len(_CLASSES))
        if not total:
            return 0.0
        equal = sum(table[c, c] for c in size) / total
        chance = sum(sum(table[c, d] for d in size) * sum(table[d, c] for d in size) for c in size) / total**2
        return (equal - chance) / (1 - chance) if chance < 1 else 0.0
