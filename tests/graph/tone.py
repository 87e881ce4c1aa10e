"""A whole agent stage: the tone of every candidate, in one word."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import ChatEngine, Grammar
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.asking import Asking, Outcome, ShardTables, Skip, count_by
from ray_pipeline.graph.stage import Stage

TONES = pa.schema([("candidate_id", pa.string()), ("prompt_id", pa.string()), ("tone", pa.string())])


class ToneSettings(Settings):
    words: tuple[str, ...] = ("friendly", "neutral", "rude")
    sampling: SamplingSettings = SamplingSettings(max_tokens=4)


class Item(NamedTuple):
    prompt_id: str
    candidate_id: str
    response: str


def items(shard: ShardTables, settings: ToneSettings) -> list[Item | Skip]:
    rows = shard.rows("candidates")
    return [Item(r["prompt_id"], r["candidate_id"], r["response"]) if r["response"] else Skip("empty") for r in rows]


async def ask(engine: ChatEngine, settings: ToneSettings, item: Item) -> Outcome:
    text = f"The tone of this answer, in one word ({', '.join(settings.words)}):\n{item.response}"
    sampling = settings.sampling.sampling(grammar=Grammar.choice(settings.words))
    reply = await engine.chat([{"role": "user", "content": text}], sampling)
    row = {"candidate_id": item.candidate_id, "prompt_id": item.prompt_id, "tone": reply.text}
    return Outcome({"tones": [row]}, [("the tone judge", reply.text in settings.words)])


TONE = Asking(tables={"tones": TONES}, items=items, ask=ask, role="tone", counts=count_by("tones", "tone"))


def tones(settings: ToneSettings, model: ModelSettings, candidates: Stage) -> Stage:
    return TONE.stage("tones", settings, model, {"candidates": candidates})
