"""Tickets against a plain model of their lives, with a clock that the test moves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from vswa_plugins.gemma3_cpu.transfer.tickets import Outcome, State, TicketBook

from tests.properties import examples

FINISHES = st.sampled_from([Outcome.ACKNOWLEDGED, Outcome.FAILED, Outcome.STOPPED])
WITHDRAWALS = st.sampled_from([Outcome.RELEASED, Outcome.DISPLACED])


class Tickets(RuleBasedStateMachine):
    """The model: per item its deadline and whether it is waiting, moving or freed."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.book: TicketBook[int] = TicketBook(lambda: self.now)
        self.item_of: dict[str, int] = {}
        self.deadline: dict[int, float] = {}
        self.waiting: set[int] = set()
        self.moving: set[int] = set()
        self.freed: list[int] = []
        self.refused = 0

    @rule(target=tickets, deadline_s=st.integers(0, 5))
    def offer(self, deadline_s: int) -> str:
        item = len(self.item_of)
        ticket = self.book.offer(item, deadline_s)
        assert ticket not in self.item_of
        self.item_of[ticket] = item
        self.deadline[item] = self.now + deadline_s
        self.waiting.add(item)
        return ticket

    @rule(ticket=tickets)
    def take(self, ticket: str) -> None:
        item = self.item_of[ticket]
        allowed = item in self.waiting and self.now < self.deadline[item]
        assert (item if allowed else None) == self.book.take(ticket)
        if allowed:
            self.waiting.remove(item)
            self.moving.add(item)
        else:
            self.refused += 1

    @rule(ticket=st.text(max_size=40))
    def take_what_was_never_offered(self, ticket: str) -> None:
        assert self.book.take(ticket) is None
        assert self.book.state(ticket) is None
        self.refused += 1

    @rule(ticket=tickets, outcome=FINISHES)
    def finish(self, ticket: str, outcome: Outcome) -> None:
        item = self.item_of[ticket]
        assert (item if item in self.moving else None) == self.book.finish(ticket, outcome)
        if item in self.moving:
            self.moving.remove(item)
            self.freed.append(item)

    @rule(ticket=tickets, outcome=WITHDRAWALS)
    def withdraw(self, ticket: str, outcome: Outcome) -> None:
        item = self.item_of[ticket]
        assert (item if item in self.waiting else None) == self.book.withdraw(ticket, outcome)
        if item in self.waiting:
            self.waiting.remove(item)
            self.freed.append(item)

    @rule(seconds=st.integers(0, 3))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        late = {item for item in self.waiting if self.deadline[item] <= self.now}
        self._free(late, self.book.expire())

    @rule()
    def close(self) -> None:
        self._free(set(self.waiting), self.book.close())

    def _free(self, expected: set[int], given: list[tuple[str, int]]) -> None:
        assert sorted(expected) == sorted(item for _, item in given)
        assert all(self.item_of[ticket] == item for ticket, item in given)
        self.waiting -= expected
        self.freed += expected

    @invariant()
    def each_offer_is_in_one_state_and_freed_once(self) -> None:
        counts = self.book.counts()
        ended = sum(getattr(counts, outcome) for outcome in Outcome)
        assert len(self.freed) == len(set(self.freed)) == ended
        assert (counts.waiting, counts.moving) == (len(self.waiting), len(self.moving))
        assert counts.offered == len(self.item_of) == ended + counts.waiting + counts.moving
        assert counts.refused == self.refused
        for ticket, item in self.item_of.items():
            state = self.book.state(ticket)
            assert (state is State.OFFERED) == (item in self.waiting)
            assert (state is State.TAKEN) == (item in self.moving)
        waiting = [self.deadline[item] for item in self.waiting]
        assert self.book.next_deadline() == min(waiting, default=None)


TestTickets = Tickets.TestCase
TestTickets.settings = examples(60, stateful_step_count=30)


def test_a_ticket_is_128_random_bits_in_hex() -> None:
    book: TicketBook[int] = TicketBook(lambda: 0.0)
    tickets = [book.offer(i, 1.0) for i in range(500)]

    assert len(set(tickets)) == 500
    assert all(len(ticket) == 32 and not set(ticket) - set("0123456789abcdef") for ticket in tickets)
    ones = sum(bin(int(ticket, 16)).count("1") for ticket in tickets)
    assert 0.48 < ones / (500 * 128) < 0.52


def test_only_what_nobody_has_taken_can_be_withdrawn() -> None:
    book: TicketBook[int] = TicketBook(lambda: 0.0)
    taken, waiting = (book.offer(i, 1.0) for i in range(2))
    book.take(taken)

    assert (None, 1) == tuple(book.withdraw(ticket, Outcome.DISPLACED) for ticket in (taken, waiting))
    assert (None, None) == (book.withdraw(waiting, Outcome.RELEASED), book.take(waiting))
    assert 0 == book.finish(taken, Outcome.ACKNOWLEDGED)


@given(st.text(alphabet=st.characters(), max_size=10))
def test_any_text_may_be_brought_as_a_ticket(text: str) -> None:
    assert TicketBook[int](lambda: 0.0).take(text) is None
