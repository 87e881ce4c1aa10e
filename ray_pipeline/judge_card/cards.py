"""Cards as other runs read them: whose they are, and whether a judge is good enough for the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.report.figures import percent
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.locations import normalise_location

#: The figures of a card run, in its folder `report`.
CARD_FILE = "judge_card.json"


class CardError(ValueError):
    """A card cannot be used; the message has the file and the remedy."""


def cards_of(key: str, model: ModelSettings) -> list[dict[str, Any]]:
    """The judges of the card of a model (`card.path`) that are this model; none for a model without a card.

    Args:
        key: of the model in the file (`models.judge`).

    Raises:
        CardError: no such file, no judge card, or a card of other models.
    """
    if model.card is None:
        return []
    what = f"{key}.card.path: {model.card.path}"
    judges = _read(what, model.card.path)
    own = [judge for judge in judges if judge["facts"]["identity"] == model.weights()]
    if not own:
        others = ", ".join(sorted({judge["facts"]["model"] for judge in judges})) or "no judge"
        raise CardError(
            f"{what} is a card of {others}, not of {model.shown} with these weights; make one with "
            "`quorum judge-check`, or name the card of this model"
        )
    return own


def _read(what: str, path: str) -> list[dict[str, Any]]:
    location = normalise_location(path)
    folder, _, name = location.rpartition("/") if location.endswith(".json") else (location, "", f"report/{CARD_FILE}")
    try:
        judges: list[dict[str, Any]] = json.loads(Folder(folder).read_bytes(name))["judges"]
        _ = [judge["facts"]["identity"] for judge in judges]
    except FileNotFoundError as error:
        raise CardError(
            f"{what} holds no {name}; make the card with `quorum judge-check`, or name its run folder"
        ) from error
    except (ValueError, KeyError, TypeError, StoreError) as error:
        raise CardError(f"{what}: {name} is not a judge card; make it with `quorum judge-check`") from error
    return judges


def below_floor(judge: Mapping[str, Any], floor: Mapping[str, float]) -> list[str]:
    """What of a judge is below the floor, or was not measured, in words; its score counts, not its interval."""
    shares = {score["name"]: score["share"]["mean"] for score in judge["scores"]}
    found = []
    for name, least in floor.items():
        share = shares.get(name)
        if share is None:
            found.append(f"{name} is not on the card, which has {', '.join(shares)}")
        elif share < least:
            found.append(f"{name} is {percent(share)}, below the floor of {percent(least)}")
    return found
