"""Which network interface the ranks of a process group talk through: the one that has its node's address in Ray."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, MutableMapping, Sequence

import psutil

# Variable -> how it names one interface. NCCL takes a bare name for the beginning of several (eth1 for eth10, too).
# It is for NCCL's meeting and for data over TCP; InfiniBand it finds by itself.
VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}


def use_interface_of(address: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell Gloo and NCCL, before they are first used, to take the interface that has this node's address.

    By themselves they take the one of the host's name (Gloo) or the first that is not loopback (NCCL). Debian gives the
    host's own name a loopback address, which ranks on another host cannot reach; and the first may be a container's
    bridge. A variable that is set stays.
    """
    name = interface_of(address, addresses())
    if name is not None:
        for variable, form in VARIABLES.items():
            environment.setdefault(variable, form.format(name))


def interface_of(address: str, known: Mapping[str, Sequence[str]]) -> str | None:
    """The interface that has `address`; None if none has, as behind address translation, or if it is loopback: then
    all nodes are on this machine, and whatever is found works.

    `known`: interface -> its addresses.
    """
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return None
    # A link-local IPv6 address has its interface behind a %.
    return next((name for name, own in known.items() if any(
        ipaddress.ip_address(one.partition("%")[0]) == wanted for one in own
    )), None)  # fmt: skip


def addresses() -> dict[str, list[str]]:
    """Interface -> its IPv4 and IPv6 addresses, on this machine."""
    return {
        name: [one.address for one in own if one.family.name in ("AF_INET", "AF_INET6")]
        for name, own in psutil.net_if_addrs().items()
    }
