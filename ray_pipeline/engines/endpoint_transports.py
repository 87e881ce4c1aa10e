"""The HTTP clients that a connection to an endpoint can use: aiohttp, or httpx, which costs ten times its CPU time.

Both keep HTTP/1.1 connections alive, at most one for each call in progress; follow no redirect; take the proxy from
the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY); and trust the same certificates (SSL_CERT_FILE,
SSL_CERT_DIR, otherwise those of certifi). Neither reads passwords from .netrc, which would replace the API key.
"""

from __future__ import annotations

import contextlib
import ssl
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Literal, NamedTuple, Protocol

from ray_pipeline.engines.endpoint_settings import EndpointSettings

_CONNECT_SECONDS = 15.0
_IDLE_SECONDS = 4.0  # below the 5 s after which uvicorn (vLLM) closes an idle connection
_HEADER_BYTES = 1 << 16  # limit of one response header; some gateways send long ones

Trouble = Literal["unreachable", "timeout", "broken"]
"""Why there is no whole response: no connection, none in time, or an end before its end."""


class Response(NamedTuple):
    """A response whose body is still to be read.

    Attributes:
        headers: names are lower case or compared without case.
        chunks: the body, decompressed.
    """

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]


class Transport(Protocol):
    """Makes requests; created on the event loop that uses it."""

    def stream(
        self, method: str, url: str, body: bytes | None, content_type: str
    ) -> AbstractAsyncContextManager[Response]:
        """One request."""
        ...

    def trouble(self, error: Exception) -> Trouble | None:
        """The kind of an exception of :meth:`stream` or of reading its chunks; None for any other exception."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


def transport(settings: EndpointSettings, headers: Mapping[str, str]) -> Transport:
    """The client that the settings choose; `headers` are sent with every request."""
    return (AiohttpTransport if settings.transport == "aiohttp" else HttpxTransport)(settings, headers)


def _headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {**headers, "Accept": "application/json"}


class AiohttpTransport:
    """A transport over ``aiohttp``."""

    def __init__(self, settings: EndpointSettings, headers: Mapping[str, str]) -> None:
        import aiohttp

        self._aiohttp = aiohttp
        self._proxy = environment_proxy(settings.address)
        tls: ssl.SSLContext | bool = True
        if urllib.parse.urlsplit(settings.address).scheme == "https":
            import httpx

            tls = httpx.create_ssl_context()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=settings.concurrency, keepalive_timeout=_IDLE_SECONDS, ssl=tls),
            headers=_headers(headers),
            timeout=aiohttp.ClientTimeout(total=None, connect=min(_CONNECT_SECONDS, settings.timeout_s)),
            max_line_size=_HEADER_BYTES,
            max_field_size=_HEADER_BYTES,
        )

    @contextlib.asynccontextmanager
    async def stream(self, method: str, url: str, body: bytes | None, content_type: str) -> AsyncIterator[Response]:
        headers = {"Content-Type": content_type}
        async with self._session.request(
            method, url, data=body, headers=headers, allow_redirects=False, proxy=self._proxy
        ) as response:
            yield Response(response.status, response.headers, response.content.iter_any())

    def trouble(self, error: Exception) -> Trouble | None:
        http = self._aiohttp
        if isinstance(error, http.ClientConnectorError | http.ConnectionTimeoutError | http.ClientHttpProxyError):
            return "unreachable"
        if isinstance(error, TimeoutError):
            return "timeout"
        return "broken" if isinstance(error, http.ClientError | OSError) else None

    async def close(self) -> None:
        await self._session.close()


class HttpxTransport:
    """A transport over ``httpx``."""

    def __init__(self, settings: EndpointSettings, headers: Mapping[str, str]) -> None:
        import httpx

        self._httpx = httpx
        timeout = settings.timeout_s
        self._client = httpx.AsyncClient(
            headers=_headers(headers),
            timeout=httpx.Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout)),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=settings.concurrency,
                keepalive_expiry=_IDLE_SECONDS,
            ),
            follow_redirects=False,
        )

    @contextlib.asynccontextmanager
    async def stream(self, method: str, url: str, body: bytes | None, content_type: str) -> AsyncIterator[Response]:
        headers = {"Content-Type": content_type}
        async with self._client.stream(method, url, content=body, headers=headers) as response:
            yield Response(response.status_code, response.headers, response.aiter_bytes(1 << 16))

    def trouble(self, error: Exception) -> Trouble | None:
        http = self._httpx
        if isinstance(error, http.ConnectError | http.ConnectTimeout | http.ProxyError):
            return "unreachable"
        if isinstance(error, TimeoutError | http.TimeoutException):
            return "timeout"
        return "broken" if isinstance(error, http.HTTPError) else None

    async def close(self) -> None:
        await self._client.aclose()


def environment_proxy(address: str) -> str | None:
    """The proxy that the environment (or the operating system's settings) names for an address; None: none.

    Raises:
        ValueError: it is no HTTP proxy.
    """
    parts = urllib.parse.urlsplit(address)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    # The host alone, too: IPv6 addresses have brackets in an address and none in NO_PROXY.
    if not proxy or any(map(urllib.request.proxy_bypass, (parts.netloc, parts.hostname or ""))):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    scheme = urllib.parse.urlsplit(proxy).scheme
    if scheme not in ("http", "https"):
        raise ValueError(
            f"the environment names a {scheme} proxy for {address}; set endpoint.transport: httpx and install "
            "httpx[socks] where the engine runs, or except the host in NO_PROXY"
        )
    return proxy
