"""What the critic found."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.stats.columns import count_values


@dataclass(frozen=True)
class CriticStats:
    """Counts over critiques. flawed_share is of the read ones; failure types are those of the read ones;
    `unread` leaves skipped critiques out: they were not needed, not lost.
    """

    rows: int
    flawed: int
    sound: int
    unread: int
    skipped: int
    flawed_share: float | None
    failure_types: dict[str, int]
    parse_status: dict[str, int]


def critic_stats(critiques: pa.Table) -> CriticStats:
    """Count flaws by type. Columns read: flawed (null when unread), failure_type, parse_status."""
    flawed = critiques.column("flawed")
    read = critiques.filter(pc.is_valid(flawed))
    bad = pc.sum(flawed).as_py() or 0
    unread = critiques.filter(pc.is_null(flawed))
    skipped = pc.sum(pc.equal(unread.column("parse_status"), "skipped")).as_py() or 0
    return CriticStats(
        rows=len(critiques),
        flawed=bad,
        sound=len(read) - bad,
        unread=len(unread) - skipped,
        skipped=skipped,
        flawed_share=bad / len(read) if len(read) else None,
        failure_types=count_values(read.column("failure_type")),
        parse_status=count_values(critiques.column("parse_status")),
    )
