"""Who gives its place on the transfer port to whom, and who is not listened to."""

from __future__ import annotations

import pytest
from vswa_plugins.gemma3_cpu.transfer.messages import VERSION, Nack, Pull, PullRefused, decode_answer
from vswa_plugins.gemma3_cpu.transfer.peers import MAX_HOSTS, MAX_WRONG, SILENT_S, WINDOW_S, Peers
from vswa_plugins.gemma3_cpu.transfer.tickets import Outcome

from tests.gemma3_transfer_helpers import FULL, Prefill, connect


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def peers(clock: Clock) -> Peers:
    return Peers(3, clock)


def test_the_longest_silent_peer_of_the_host_with_most_of_them_makes_room(peers: Peers, clock: Clock) -> None:
    for peer, host in (("honest", "h"), ("first", "bad"), ("second", "bad")):
        peers.enter(peer, host)
        clock.now += 0.01
    assert peers.full
    clock.now += SILENT_S

    assert ["first", "honest", "second"] == [peers.displace() for _ in range(3)]
    assert not peers.full


def test_who_has_only_just_come_or_has_spoken_makes_no_room(peers: Peers, clock: Clock) -> None:
    for peer in ("a", "b", "c"):
        peers.enter(peer, "h")
    peers.spoke("a")
    assert None is peers.displace()
    assert pytest.approx(SILENT_S) == peers.next_silent()

    clock.now += SILENT_S
    assert ["b", "c", None] == [peers.displace() for _ in range(3)]
    assert None is peers.next_silent()


def test_a_place_is_given_back_once(peers: Peers, clock: Clock) -> None:
    for peer in ("a", "b", "c"):
        peers.enter(peer, "h")
    clock.now += SILENT_S
    assert "a" == peers.displace()
    peers.enter("d", "h")
    peers.leave("a")

    assert peers.full


def test_a_host_that_guesses_is_not_listened_to_until_the_window_is_over(peers: Peers, clock: Clock) -> None:
    for _ in range(MAX_WRONG):
        peers.wrong("bad")
    assert not peers.is_barred("bad")
    peers.wrong("bad")
    assert (True, False) == (peers.is_barred("bad"), peers.is_barred("good"))

    clock.now += WINDOW_S
    assert not peers.is_barred("bad")


def test_so_many_hosts_are_remembered_and_no_more(peers: Peers) -> None:
    for host in range(MAX_HOSTS + 100):
        peers.wrong(str(host))

    assert MAX_HOSTS == len(peers._wrong)


def test_a_host_that_guesses_is_closed_on() -> None:
    with Prefill() as prefill:
        for number in range(MAX_WRONG + 1):
            with connect(prefill.server.address) as stranger:
                stranger.send(Pull(VERSION, f"{number:032x}", "f", FULL))
                assert isinstance(stranger.receive(decode_answer), PullRefused)

        with connect(prefill.server.address) as stranger, pytest.raises(OSError):
            stranger.send(Pull(VERSION, "0" * 32, "f", FULL))
            stranger.receive(decode_answer)
        assert MAX_WRONG + 1 == prefill.server.counts().refused


def test_a_wrong_fingerprint_that_is_given_up_frees_the_blocks() -> None:
    with Prefill() as prefill:
        ticket = prefill.offer()
        with connect(prefill.server.address) as decode:
            decode.send(Pull(VERSION, ticket, "another", FULL))
            assert isinstance(decode.receive(decode_answer), PullRefused)
            decode.send(Nack("another model"))

            assert (ticket, Outcome.FAILED, (0, 0)) == prefill.released()
