"""A real S3 API server on loopback, spoken to by pyarrow as any bucket is."""

from __future__ import annotations

import contextlib
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest

BUCKET = "quorum-test"
#: As users have them: in the environment, which processes that are started meanwhile inherit.
_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server with one bucket; its credentials are in the environment."""
    server_module = pytest.importorskip("moto.server", reason="the S3 server (moto, in the dev extra) is not installed")
    running = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    address = f"{host}:{port}"
    kept = {name: os.environ.get(name) for name in _KEYS}
    os.environ.update(_KEYS)
    try:
        urllib.request.urlopen(urllib.request.Request(f"http://{address}/{BUCKET}", method="PUT"), timeout=10).close()
        yield address
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        running.stop()


def location(address: str, path: str) -> str:
    """URI of a folder in the bucket."""
    query = urllib.parse.urlencode({"scheme": "http", "endpoint_override": address, "region": "us-east-1"})
    return f"s3://{BUCKET}/{path}?{query}"
