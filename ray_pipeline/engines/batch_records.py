"""The records of batches in a call log's folder (`engines/endpoint_batches.py` writes them)."""

from __future__ import annotations

import dataclasses
import logging

from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder

logger = logging.getLogger("quorum.openai")

#: Folder of the records of one model at an endpoint, under the call log's; a digest follows.
BATCHES = "batches-"
_ENDED = ("completed", "failed", "expired", "cancelled")


@dataclasses.dataclass
class Batch:
    """One batch, and its record.

    Attributes:
        name: of the record.
        ids: `custom_id`s of its calls.
        file: the server's number of the file of requests; "" before it is uploaded.
        id: the server's number; "" before it is known.
        status: the server's word for its state; "sending" before it is known.
        created: seconds since 1970 at which it was recorded.
    """

    name: str
    ids: list[str]
    model: str = ""
    file: str = ""
    id: str = ""
    status: str = "sending"
    created: float = 0.0

    @property
    def open(self) -> bool:
        return self.status not in _ENDED


def read_batches(folder: Folder) -> list[Batch]:
    """The recorded batches, oldest first; a record that cannot be read is left out with a warning."""
    found = []
    for name in folder.names(".json"):
        try:
            found.append(Batch(**folder.read_json(name)))
        except (FileNotFoundError, StoreError, TypeError) as error:
            logger.warning("%s is no record of a batch (%s)", folder.uri(name), error)
    return sorted(found, key=lambda batch: (batch.created, batch.name))


def batches_of(root: Folder) -> list[Batch]:
    """The batches of all models under a call log's folder."""
    return [batch for name in root.folders() if name.startswith(BATCHES) for batch in read_batches(root / name)]
