"""Which labels are open after a level of judges, where the gate decides by posteriors (`data/escalation.py`).

After a level, the model of `data/posterior_gate.py` is fitted to the votes of the judges so far on all candidates. A
candidate is open where its label by that posterior, without the critic, is `abstain`. Where the judges so far count as
one, the votes show nothing of how often it is right, and every complete candidate is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.escalation import Escalation
from ray_pipeline.data.gate import decide
from ray_pipeline.data.judge_votes import by_role
from ray_pipeline.data.posterior_gate import decided, dependent, effective_text, fitted, model_facts, verdicts_of
from ray_pipeline.data.rows import one_array
from ray_pipeline.graph.stage import Stage, StageRef, WholeInput, WholeWork
from ray_pipeline.store.schemas import LEVELS


class _Given(Settings):
    rule: Escalation


def open_labels(rule: Escalation, candidates: Stage, verdicts: Sequence[Stage], name: str, group: str) -> Stage:
    """One row for each candidate: whether the levels of the rule leave its label open.

    Args:
        rule: with the levels that have been asked.
        verdicts: theirs.
    """
    given = _Given(rule=rule)
    return Stage(
        name=name,
        group=group,
        work=WholeWork(function=find_open, settings=given, tables=("levels",)),
        config=given.decisive(),
        inputs={"candidates": candidates, **by_role(verdicts)},
    )


def find_open(given: WholeInput) -> dict[str, Any]:
    """Fit the model to the votes of all shards, then write each shard."""
    rule: Escalation = given.settings.rule
    judges, level = rule.judges, len(rule.levels)
    model, votes = fitted(given, "candidates", judges, rule.gate, skipped=level > 1)
    without_critic = rule.gate.model_copy(update={"use_critic": False})
    ref = StageRef("levels", given.fingerprint, given.folder.location, given.num_shards, ("levels",))
    counts = {"open": 0, "settled": 0}
    for shard in range(given.num_shards):
        candidates = given.inputs["candidates"].table().read(shard, ["candidate_id", "prompt_id", "finish_reason"])
        verdicts = verdicts_of(given, shard, one_array(candidates["candidate_id"]))
        numbers = decide(candidates, verdicts, None, judges, without_critic.numbers)
        table = decided(numbers, model.posterior(votes[shard]), without_critic)
        complete = np.asarray(pc.not_equal(table["label"], "incomplete"))
        going = complete & (rule.is_open(table["label"]) if len(model.groups) > 1 else True)
        table = table.append_column("open", pa.array(going)).append_column(
            "level", pa.array(np.full(len(going), level), pa.int32())
        )
        ref.table().write(shard, table.select(LEVELS.names).cast(LEVELS))
        counts = {"open": counts["open"] + int(going.sum()), "settled": counts["settled"] + int((~going).sum())}
        given.tick(shard + 1, given.num_shards, "shards")
    facts = model_facts(model, judges)
    given.log(f"level {level}: {counts['open']:,} labels are open; {effective_text(facts)}")
    for line in dependent(facts):
        given.log(line)
    return {"counts": counts, "level": level, "posterior": facts}
