"""Judge cards as stages: items of sets and probes in, the card of each judge out."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.sources import InputError
from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.stage import BadInput, Stage, StageRef, StageResult, WholeInput, WholeWork
from ray_pipeline.judge_card.cards import CARD_FILE
from ray_pipeline.judge_card.measure import JudgeFacts
from ray_pipeline.judge_card.probes import PROBES, ProbeTexts, probe_items
from ray_pipeline.judge_card.sets import SETS, PublicSet, read_set
from ray_pipeline.report.documents import as_json
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.local import written_here


class MeasureCard(Settings):
    """The `measure` block of a judge card."""

    draws: int = Field(2000, ge=100, description="bootstrap samples of the questions")
    seed: int = Field(0, description="seed of all sampling in this block")


class _Items(Settings):
    sets: tuple[PublicSet, ...]
    commits: dict[str, str]
    probes: ProbeTexts | None
    families: tuple[str, ...]


def card_items_stage(sets: Sequence[PublicSet], probes: ProbeTexts | None, families: Sequence[str]) -> Stage:
    """The table `card_items`, sharded by question.

    Args:
        families: of the judges' models.

    Raises:
        InputError: a set is missing.
    """
    commits: dict[str, str] = {one.type: one.digest() for one in sets}
    families = sorted(set(families)) if probes is not None else ()
    return Stage(
        name="items",
        work=WholeWork(
            function=make_card_items,
            settings=_Items(sets=tuple(sets), commits=commits, probes=probes, families=tuple(families)),
            tables=("card_items",),
        ),
        config={
            "sets": [one.decisive(exclude={"path", "revision"}) for one in sets],
            "probes": None if probes is None else probes.decisive(),
            "families": list(families),
        },
        external=commits,
    )


def make_card_items(given: WholeInput) -> dict[str, Any]:
    settings: _Items = given.settings
    items: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    try:
        for one in settings.sets:
            found = read_set(one, settings.commits[one.type] if one.path is None else None)
            counts[one.type] = len(found)
            items += found
    except InputError as error:
        raise BadInput(str(error)) from error
    if settings.probes is not None:
        probed = list(probe_items(settings.probes, settings.families))
        counts[PROBES] = len(probed)
        items += probed
    ref = StageRef("items", given.fingerprint, given.folder.location, given.num_shards, ("card_items",))
    ref.table().write_rows(sorted(items, key=operator.itemgetter("item_id")))
    given.log(
        ", ".join(f"{count} items of {SETS[name].title if name in SETS else name}" for name, count in counts.items())
    )
    return {"counts": counts}


class CardPage(Settings):
    """Content of a card's page beside the tables; stored in the manifest, so that the page can be rewritten.

    Attributes:
        judges: in order.
        asked: judge → the stage that asked it.
        probes: probe → what it does, in words.
    """

    judges: tuple[dict[str, Any], ...]
    asked: dict[str, str]
    probes: dict[str, str] = Field(default_factory=dict)
    currency: str = "USD"
    measure: MeasureCard = MeasureCard()


def card_stage(page: CardPage, items: Stage, asked: Sequence[Stage]) -> Stage:
    """The page and judge_card.json."""
    return Stage(
        name="card",
        view="report",
        role="page",
        work=WholeWork(function=write_card_stage, settings=page),
        config=page.decisive(),
        inputs={"items": items, **{f"asked/{stage.name}": stage for stage in asked}},
    )


def write_card_stage(given: WholeInput) -> dict[str, Any]:
    headline = _write(given.settings, list(given.inputs.values()), given.folder)
    given.log(headline)
    return {"headline": headline}


def rewrite_page(run: Run) -> Folder:
    """Rewrite the card of a run from its tables, as far as they exist; returns its folder.

    Raises:
        StoreError: its items do not exist yet.
    """
    results = [result for name, result in run.results.items() if run.stages[name].role != "page"]
    if not any("card_verdicts" in result.tables for result in results):
        raise StoreError(f"{run.folder.location} has no verdicts yet; `quorum run` makes them")
    name = run.page_folder("card")
    _write(CardPage.model_validate(run.page), results, run.folder / name)
    return run.show("report", name)


def _write(page: CardPage, results: Sequence[StageResult], folder: Folder) -> str:
    """Measure and write; returns the headline."""
    from ray_pipeline.judge_card.measure import judge_card
    from ray_pipeline.judge_card.page import card_page
    from ray_pipeline.report.write import write_page

    by_name: Mapping[str, StageResult] = {result.name: result for result in results}
    items = by_name["items"].table().read_all()
    asked = [by_name[name] for name in dict.fromkeys(page.asked.values()) if name in by_name]
    verdicts = pa.concat_tables([result.table().read_all() for result in asked])
    judges = [facts for facts in (JudgeFacts(**judge) for judge in page.judges) if page.asked[facts.judge] in by_name]
    engines: dict[str, dict[str, Usage]] = {}
    for facts in judges:
        stage = page.asked[facts.judge]
        engines.setdefault(facts.base, {})[stage] = by_name[stage].usage
    cards = [
        judge_card(
            facts,
            items,
            verdicts,
            by_name[page.asked[facts.judge]].usage,
            sum(engines[facts.base].values(), Usage()),
            page.measure.draws,
            page.measure.seed,
        )
        for facts in judges
    ]
    usage = sum((result.usage for result in asked), Usage())
    document = {"judges": as_json(cards), "currency": page.currency}
    shown = card_page(document, page.probes, items=len(items), verdicts=len(verdicts), usage=usage)
    with written_here(folder) as local:
        write_page(shown, {CARD_FILE: document}, local)
    return shown.headline
