"""An endpoint that answers in the form that it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ray_pipeline.engines import endpoint_retry
from tests.endpoint import KEY, Endpoint
from tests.operate.at_an_endpoint import reply


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setattr(endpoint_retry, "_BACKOFF_SECONDS", 0.01)
    with Endpoint(reply) as endpoint:
        yield endpoint
