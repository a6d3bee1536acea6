"""Hosts on one network, made of network namespaces and a bridge; each link between two of them can be cut.

Needs root and iproute2. A cut is silent, as a pulled cable is: frames go to a hardware address that nobody has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NETWORK = "10.213.77"
NOBODY = "02:00:00:00:00:ff"
REACH = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=1)
except ConnectionRefusedError:  # by the host itself
    pass
"""


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


def why_not():
    """Why namespaces can't be made here, or None."""
    if not shutil.which("ip"):
        return "needs iproute2 (apt-get install iproute2)"
    probe = f"lookonce-probe-{os.getpid()}"
    made = ip("netns", "add", probe, check=False)
    if made.returncode:
        return f"needs the right to make network namespaces: {made.stderr.strip()}"
    link = ip("link", "add", "lo-probe0", "type", "veth", "peer", "name", "lo-probe1", "netns", probe, check=False)
    ip("netns", "del", probe, check=False)
    ip("link", "del", "lo-probe0", check=False)
    return f"needs virtual network links: {link.stderr.strip()}" if link.returncode else None


class Hosts:
    """`Hosts("gateway", "vision")`: namespaces of those names with an address each; a context manager."""

    def __init__(self, *names):
        self._id = f"lo{os.getpid() % 100000}"
        self.names = names
        self.address = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, 1)}
        self._mac = {name: f"02:00:00:00:77:{number:02x}" for number, name in enumerate(names, 1)}

    def prefix(self, name):
        """What runs a command on a host."""
        return ("ip", "netns", "exec", f"{self._id}-{name}")

    def cut(self, one, other):
        """Nothing passes between two hosts any more."""
        for here, there in ((one, other), (other, one)):
            self._neighbour(here, "replace", self.address[there], "lladdr", NOBODY, "nud", "permanent")

    def heal(self, one, other):
        """The link is whole again."""
        for here, there in ((one, other), (other, one)):
            self._neighbour(here, "replace", self.address[there], "lladdr", self._mac[there], "nud", "permanent")

    def reaches(self, one, other):
        """Whether a packet gets through."""
        command = [*self.prefix(one), sys.executable, "-c", REACH, self.address[other]]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _neighbour(self, name, *arguments):
        ip("-n", f"{self._id}-{name}", "neigh", *arguments, "dev", "eth0")

    def __enter__(self):
        # The bridge has a namespace of its own: the firewall of a machine with Docker drops what its bridges forward.
        switch = f"{self._id}-switch"
        try:
            ip("netns", "add", switch)
            ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", switch, "link", "set", "bridge", "up")
            ip("link", "add", f"{self._id}v0", "type", "veth", "peer", "name", "port0", "netns", switch)
            ip("-n", switch, "link", "set", "port0", "master", "bridge", "up")
            ip("addr", "add", f"{NETWORK}.254/24", "dev", f"{self._id}v0")
            ip("link", "set", f"{self._id}v0", "up")
            for number, name in enumerate(self.names, 1):
                space = f"{self._id}-{name}"
                ip("netns", "add", space)
                ip("-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
                ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
                ip("-n", space, "link", "set", "eth0", "address", self._mac[name], "up")
                ip("-n", space, "link", "set", "lo", "up")
                ip("-n", space, "addr", "add", f"{self.address[name]}/24", "dev", "eth0")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for name in (*self.names, "switch"):
            ip("netns", "del", f"{self._id}-{name}", check=False)
        ip("link", "del", f"{self._id}v0", check=False)
