"""Hosts on one machine: network namespaces on a bridge, each with an address, a loopback and ports of its own."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import uuid


@functools.cache
def hosts_can_be_made() -> bool:
    """Whether this user may make network namespaces and bridges here, and has the tool for it."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with Hosts() as hosts:
            hosts.add()
    except subprocess.CalledProcessError:
        return False
    return True


class Hosts:
    """A bridge and the hosts on it, for a `with` block. This machine is one of them, at `address`."""

    def __init__(self) -> None:
        self._mark = f"q{uuid.uuid4().hex[:6]}"  # the name of an interface has 15 bytes
        self._subnet = f"10.77.{uuid.uuid4().int % 250}"
        self._names: list[str] = []

    @property
    def address(self) -> str:
        return f"{self._subnet}.1"

    def __enter__(self) -> Hosts:
        _ip("link", "add", self._mark, "type", "bridge")
        _ip("address", "add", f"{self.address}/24", "dev", self._mark)
        _ip("link", "set", self._mark, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self._mark], check=False, capture_output=True)

    def add(self) -> tuple[list[str], str]:
        """A new host: what to put before a command that is to run there, and its address."""
        number = len(self._names)
        name, cable, address = f"{self._mark}n{number}", f"{self._mark}v{number}", f"{self._subnet}.{number + 2}"
        _ip("netns", "add", name)
        self._names.append(name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", cable, "master", self._mark, "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "route", "add", "default", "via", self.address)
        return ["ip", "netns", "exec", name], address


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
