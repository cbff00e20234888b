"""Transactions over two servers, struck at every packet of their commit: they end everywhere alike, or are said not to.

The client is killed, stopped and cut off, and the servers are killed, before and after each packet.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from shardkit.testing.proxy import Action
from tests.conftest import FLAVOUR
from tests.faults.bank import SHARDS, Bank, Client

pytestmark = getattr(pytest.mark, FLAVOUR)

Fault = Callable[[Bank, Client, str], Action]
#: A commit of two shards has at least: XA END, XA PREPARE, INSERT, COMMIT, XA COMMIT, and their answers.
FEWEST_PACKETS = 10


@pytest.fixture(scope="module")
def bank() -> Iterator[Bank]:
    with Bank() as opened:
        yield opened


def cut_before(_bank: Bank, _client: Client, _shard: str) -> Action:
    return Action.CUT_BEFORE


def cut_after(_bank: Bank, _client: Client, _shard: str) -> Action:
    return Action.CUT_AFTER


def isolate_before(bank: Bank, _client: Client, _shard: str) -> Action:
    """The client reaches nothing any more, and what it sends now is lost."""
    bank.isolate()
    return Action.DROP


def kill_before(_bank: Bank, client: Client, _shard: str) -> Action:
    client.kill()
    return Action.DROP


def kill_after(_bank: Bank, client: Client, _shard: str) -> Action:
    client.kill()
    return Action.FORWARD


def stop(_bank: Bank, client: Client, _shard: str) -> Action:
    """The client stands still for as long as the janitor needs, and then goes on."""
    client.stop()
    return Action.FORWARD


def every_packet(bank: Bank, fault: Fault, *, meanwhile: bool = False) -> int:
    """Strike at each packet in turn; the number of packets that a commit has."""
    at = 1
    while bank.struck(at, fault, meanwhile=meanwhile):
        assert bank.violations() == [], f"packet {at}"
        at += 1
    assert bank.violations() == []
    return at - 1


@pytest.mark.parametrize("fault", [cut_before, cut_after, isolate_before, kill_before, kill_after])
def test_struck_at_every_packet(bank: Bank, fault: Fault) -> None:
    assert every_packet(bank, fault) >= FEWEST_PACKETS


def test_stopped_at_every_packet(bank: Bank) -> None:
    assert every_packet(bank, stop, meanwhile=True) >= FEWEST_PACKETS


def kill_servers(*shards: str) -> Fault:
    def fault(bank: Bank, _client: Client, _shard: str) -> Action:
        for shard in shards:
            bank.servers[shard].kill()
        for shard in shards:
            bank.servers[shard].start()
        return Action.FORWARD

    return fault


def test_both_servers_killed_at_every_packet(bank: Bank) -> None:
    assert every_packet(bank, kill_servers(*SHARDS)) >= FEWEST_PACKETS


@pytest.mark.soak
@pytest.mark.parametrize("shard", SHARDS)
def test_one_server_killed_at_every_packet(bank: Bank, shard: str) -> None:
    assert every_packet(bank, kill_servers(shard)) >= FEWEST_PACKETS


def kill_client(_bank: Bank, client: Client) -> None:
    client.kill()


def cut_everybody(bank: Bank, _client: Client) -> None:
    for proxy in bank.proxies.values():
        proxy.cut()


def stop_for_a_while(_bank: Bank, client: Client) -> None:
    client.stop()
    time.sleep(1)
    client.go_on()


def crash(shard: str) -> Callable[[Bank, Client], None]:
    def fault(bank: Bank, _client: Client) -> None:
        bank.servers[shard].kill()
        bank.servers[shard].start()

    return fault


LOAD = [kill_client, cut_everybody, stop_for_a_while, *map(crash, SHARDS)]


def check_load(bank: Bank, seconds: float) -> None:
    already = len(bank.said)
    bank.under_load(seconds, LOAD, seed=already)
    assert bank.violations() == []
    said = Counter(each.partition(":")[0] for each in list(bank.said.values())[already:])
    assert said["ok"] > 2 * seconds
    assert said["dead"] + said["failed"]


def test_under_load(bank: Bank) -> None:
    check_load(bank, 10)


@pytest.mark.soak
def test_under_load_for_long(bank: Bank) -> None:
    check_load(bank, 600)


@pytest.mark.parametrize("fault", [cut_before, kill_before])
def test_the_proof_sees_transfers_that_are_not_atomic(fault: Fault) -> None:
    """The same, with shards that commit one after the other: what is checked here can fail."""
    with Bank("best_effort") as bank:
        at = 1
        while not bank.violations():
            assert bank.struck(at, fault), "no packet made a difference"
            at += 1
