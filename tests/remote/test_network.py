"""Which interface Gloo and NCCL are told to take."""

from __future__ import annotations

import socket

import pytest

from rlhf_ray.remote import network
from rlhf_ray.remote.network import addresses, interface_of, use_interface_of

# A host as Kubernetes has it: a container's bridge before the network card, and an InfiniBand card with an address.
KNOWN = {
    "lo": ["127.0.0.1", "127.0.1.1", "::1"],
    "docker0": ["172.17.0.1"],
    "eth0": ["10.0.0.7", "fe80::1c2:3ff%eth0", "2001:db8::7"],
    "ib0": ["192.168.5.7"],
}


@pytest.mark.parametrize(("address", "interface"), [
    ("10.0.0.7", "eth0"),
    ("172.17.0.1", "docker0"),
    ("192.168.5.7", "ib0"),
    ("2001:0db8::0007", "eth0"),  # the same address, otherwise written
    ("fe80::1c2:3ff", "eth0"),
    ("10.0.0.8", None),  # another host's
    ("127.0.0.1", None),
    ("127.0.1.1", None),
    ("::1", None),
])  # fmt: skip
def test_the_interface_is_the_one_that_has_the_address(address, interface):
    assert interface_of(address, KNOWN) == interface


def test_gloo_and_nccl_are_told_each_in_its_own_way_and_what_a_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(network, "addresses", lambda: KNOWN)
    environment = {}
    use_interface_of("10.0.0.7", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
    environment = {"NCCL_SOCKET_IFNAME": "ib"}
    use_interface_of("10.0.0.7", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "ib"}
    environment = {}
    use_interface_of("10.0.0.8", environment)
    assert environment == {}


def test_addresses_are_those_of_this_machine():
    loopback = [name for name, own in addresses().items() if "127.0.0.1" in own]
    assert len(loopback) == 1 and loopback[0] in [name for _, name in socket.if_nameindex()]
