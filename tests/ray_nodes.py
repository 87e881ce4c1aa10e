"""A Ray cluster of real processes on this machine: a head with its dashboard, and nodes that join and are killed.

Everything is started by `ray start --block` with ports and a folder of its own, so that no other Ray on the machine is
met, and ended by process id.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import psutil

from tests.hosts import Hosts


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Node:
    """One `ray start --block` with all its children: raylet, workers, and on the head the servers."""

    def __init__(self, *arguments: str, env: Mapping[str, str], host: Sequence[str] = ()) -> None:
        executable = os.path.join(os.path.dirname(sys.executable), "ray")
        self.process = subprocess.Popen(
            [*host, executable, "start", "--block", "--disable-usage-stats", *arguments],
            env={**os.environ, **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self.process.pid)
            return [*parent.children(recursive=True), parent]
        return []

    def kill(self) -> None:
        """As a machine that loses its power: every process at once, no good-bye."""
        found = self.processes()
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=20)
        self.process.wait(20)


class RayNodes:
    """A head and its worker nodes, for a `with` block.

    Args:
        head: resources of the head beside its CPUs; env: of every node.
        dashboard: and with it the job server; without it a head is up in a third of the time.
        own_addresses: each node that is added is a host of its own (see `hosts`), with nothing in common but files.
    """

    def __init__(
        self,
        *,
        cpus: int = 2,
        head: Mapping[str, float] | None = None,
        env: Mapping[str, str] | None = None,
        dashboard: bool = True,
        own_addresses: bool = False,
    ):
        self._hosts = Hosts() if own_addresses else None
        self._with_dashboard = dashboard
        # Short: the path of a socket has 107 bytes, and Ray's own part of it is long.
        self.folder = tempfile.mkdtemp(prefix="qr-", dir="/tmp")
        self._port, self._dashboard, self._client = free_ports(3)
        self._cpus, self._head_resources = cpus, dict(head or {})
        # A token is asked for only where this user's Ray has made one, which another test may have done or not.
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        self.env = {"PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0", **(env or {})}
        self.env["RAY_metrics_report_interval_ms"] = "1000"
        self.env["RAY_health_check_period_ms"] = "1000"
        self.env["RAY_health_check_failure_threshold"] = "3"
        self.env["RAY_health_check_timeout_ms"] = "3000"
        self.head: Node | None = None
        self.nodes: list[Node] = []
        self._metrics: list[str] = []
        self._numbers = itertools.count()

    @property
    def ip(self) -> str:
        """Where all nodes reach this machine."""
        return "127.0.0.1" if self._hosts is None else self._hosts.address

    @property
    def address(self) -> str:
        """What `ray.init` and RAY_ADDRESS take."""
        return f"{self.ip}:{self._port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self._dashboard}"

    def __enter__(self) -> RayNodes:
        try:
            if self._hosts is not None:
                self._hosts.__enter__()
            self.start_head()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for node in [*self.nodes, *([self.head] if self.head else [])]:
            node.kill()  # their folder goes too, so nobody needs a farewell of some ten seconds each
        if self._hosts is not None:
            self._hosts.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_head(self) -> None:
        """Also after the head was killed: at the same addresses, and with nothing of what it knew."""
        agent, grpc, metrics = free_ports(3)
        self._metrics.append(f"{self.ip}:{metrics}")
        self.head = Node(
            "--head",
            f"--port={self._port}",
            f"--dashboard-port={self._dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--include-dashboard={'true' if self._with_dashboard else 'false'}",
            f"--ray-client-server-port={self._client}",
            f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={grpc}",
            f"--metrics-export-port={metrics}",
            f"--temp-dir={self.folder}",
            *([f"--node-ip-address={self.ip}"] if self._hosts is not None else []),
            *self._room(self._cpus, 0, self._head_resources, {}),
            env=self.env,
        )
        self._until(lambda: self._living() > 0 and (not self._with_dashboard or self._answers()), "the head")

    def add(
        self,
        *,
        cpus: int = 1,
        gpus: int = 0,
        resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> Node:
        before = self._living() if wait else 0
        host, ip = ([], None) if self._hosts is None else self._hosts.add()
        (metrics,) = free_ports(1)
        self._metrics.append(f"{ip or self.ip}:{metrics}")
        node = Node(
            f"--address={self.address}",
            *([f"--node-ip-address={ip}"] if ip else []),
            f"--metrics-export-port={metrics}",
            # Of its own, as on a machine of its own: a node unpacks a job's package anew, also under one that reads it.
            f"--temp-dir={self.folder}/{next(self._numbers)}",
            *self._room(cpus, gpus, resources or {}, labels or {}),
            env={**self.env, **(env or {})},
            host=host,
        )
        self.nodes.append(node)
        if wait:
            self._until(lambda: self._living() > before, "a node")
        return node

    @staticmethod
    def _room(cpus: int, gpus: int, resources: Mapping[str, float], labels: Mapping[str, str]) -> list[str]:
        room = [f"--num-cpus={cpus}", f"--num-gpus={gpus}", "--object-store-memory=100000000"]
        if resources:
            room.append(f"--resources={json.dumps(dict(resources))}")
        if labels:
            room.append(f"--labels={','.join(f'{k}={v}' for k, v in labels.items())}")
        return room

    def _living(self) -> int:
        """How many nodes the head knows to be alive; 0 while it does not answer."""
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        try:
            socket.create_connection((self.ip, self._port), timeout=1).close()
            state = GlobalState()
            state._initialize_global_state(
                GcsClientOptions.create(self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
            )
            return sum(node["Alive"] for node in state.node_table())
        except Exception:  # Of many kinds while it starts; whoever asks waits for an end of his own.
            return 0

    def at_work(self, name: str) -> list[Node]:
        """The worker node of each process of that name, as Ray names it while it works: an engine's actor, a task."""
        found = []
        for node in self.nodes:
            for process in node.processes():
                with contextlib.suppress(psutil.Error):  # it ended while we looked
                    if name in " ".join(process.cmdline()[:1]):
                        found.append(node)
        return found

    def metrics(self) -> str:
        """What Prometheus would read from all nodes that answer."""
        pages = []
        for address in self._metrics:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
                pages.append(page.read().decode())
        return "\n".join(pages)

    def _answers(self) -> bool:
        """Whether jobs can be submitted: the servers behind the dashboard come up one after another."""
        try:
            urllib.request.urlopen(f"{self.dashboard}/api/jobs/", timeout=5).close()
        except OSError:
            return False
        return True

    def _until(self, ready: Any, what: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"{what} did not come up within {seconds:.0f} s; see {self.folder}"
            time.sleep(0.2)
