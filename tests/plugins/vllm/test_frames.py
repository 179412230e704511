"""Batches of a ZeroMQ socket: each handed on once, in order; what is missing asked for, or lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.vllm.frames import (
    END,
    Action,
    Ask,
    Batch,
    BatchOrder,
    Lost,
    Take,
    answered,
    events_of,
    question,
    subscribed,
)

from tests.properties import examples
from vswa_plugin.errors import ProtocolError


def batch(number: int) -> Batch:
    return Batch(number, b"%d" % number)


def numbers(actions: Sequence[Action]) -> list[object]:
    """Taken numbers as they are, everything else as it is."""
    return [each.batch.number if isinstance(each, Take) else each for each in actions]


# -- frames ----------------------------------------------------------------------------------------


def test_a_message_has_topic_number_and_payload() -> None:
    assert Batch(258, b"x") == subscribed([b"topic", (258).to_bytes(8, "big"), b"x"])


def test_an_answer_has_an_empty_frame_before_them_and_ends_with_minus_one() -> None:
    assert Batch(7, b"x") == answered([b"", b"topic", (7).to_bytes(8, "big"), b"x"])
    assert END == answered([b"", b"", b"\xff" * 8, b""]).number


def test_the_question_is_an_empty_frame_and_the_first_number() -> None:
    assert [b"", bytes(6) + b"\x01\x02"] == question(258)


@pytest.mark.parametrize(
    ("read", "frames"),
    [
        (subscribed, []),
        (subscribed, [b"t", bytes(8)]),
        (subscribed, [b"t", bytes(7), b"x"]),
        (subscribed, [b"", b"t", bytes(8), b"x"]),
        (answered, [b"t", bytes(8), b"x"]),
        (answered, [b"", b"t", b"", b"x"]),
    ],
)
def test_other_frames_are_refused(read: Callable[[Sequence[bytes]], Batch], frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError, match="expected"):
        read(frames)


# -- payloads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, None], ids=str)
def test_a_payload_has_time_events_and_the_rank(rank: int | None) -> None:
    payload = msgspec.msgpack.encode([1.5, [{"type": "AllBlocksCleared"}], rank])

    assert [{"type": "AllBlocksCleared"}] == events_of(payload, 0)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        *map(msgspec.msgpack.encode, (4711, {"events": []}, [1.5], [1.5, 4711, 0], [1.5, [4711], 1])),
    ],
)
def test_another_payload_is_refused_and_not_quoted(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="expected a batch") as refused:
        events_of(payload, 0)

    assert "4711" not in str(refused.value)


# -- order -----------------------------------------------------------------------------------------


def test_batches_in_order_are_taken_as_they_come() -> None:
    order = BatchOrder()

    assert [[0], [1], [2]] == [numbers(order.came(batch(number))) for number in range(3)]


def test_a_hole_is_asked_for_and_what_came_behind_it_waits() -> None:
    order = BatchOrder()
    order.came(batch(0))

    assert [Ask(1)] == order.came(batch(3))
    assert [] == order.came(batch(4))
    assert [[1], [2], [3]] == [numbers(order.again(batch(number))) for number in (1, 2, 3)]
    assert [4] == numbers(order.answer_ended())
    assert [5] == numbers(order.came(batch(5)))


def test_what_the_publisher_does_not_have_any_more_is_lost() -> None:
    order = BatchOrder()
    order.came(batch(0))
    order.came(batch(5))

    assert [Lost(1, 4), 4] == numbers(order.again(batch(4)))
    assert [5] == numbers(order.answer_ended())


def test_a_hole_is_lost_where_no_answer_comes() -> None:
    order = BatchOrder()
    order.came(batch(0))
    order.came(batch(2))

    assert [Lost(1, 2), 2] == numbers(order.answer_ended())


def test_batches_that_were_missed_without_a_sign_are_found_by_asking() -> None:
    order = BatchOrder()

    assert [Ask(0)] == order.ask()
    assert [] == order.ask(), "one question at a time"
    assert [0, 1] == numbers([*order.again(batch(0)), *order.again(batch(1)), *order.answer_ended()])
    assert [] == order.came(batch(1)), "it comes by subscription after all"
    assert [2] == numbers(order.came(batch(2)))


def test_a_publisher_that_begins_anew_loses_all_and_is_asked_from_its_first_batch() -> None:
    order = BatchOrder()
    for number in range(5):
        order.came(batch(number))

    assert [Lost(5, 0), 0] == numbers(order.came(batch(0)))
    assert [1] == numbers(order.came(batch(1)))
    assert [Lost(2, 1), Ask(0)] == numbers(order.came(batch(1)))


def test_the_answer_of_a_publisher_that_is_gone_is_thrown_away() -> None:
    order = BatchOrder()
    order.came(batch(0))
    order.came(batch(9))  # asks from 1 on

    assert [Lost(1, 9), 9, Lost(10, 1)] == numbers(order.came(batch(1))), "a new publisher"
    assert [] == order.again(batch(2)), "of the old one"
    assert [Ask(0)] == order.answer_ended()
    assert [0] == numbers(order.again(batch(0)))
    assert [1] == numbers(order.answer_ended())


class Publisher:
    """As vLLM's: numbers from 0, the last ``kept`` batches answered."""

    def __init__(self, kept: int, life: int) -> None:
        self.life = life
        self.next = 0
        self.ring: deque[Batch] = deque(maxlen=kept)

    def publish(self) -> Batch:
        made = Batch(self.next, b"%d/%d" % (self.life, self.next))
        self.next += 1
        self.ring.append(made)
        return made


STEPS = st.lists(st.sampled_from(["arrives", "arrives", "missed", "restart", "looked"]), max_size=60)


@examples(300)
@given(steps=STEPS, kept=st.integers(1, 6), answers=st.booleans())
def test_each_batch_is_taken_once_in_order_or_lies_in_a_loss(
    steps: list[str], kept: int, answers: bool
) -> None:
    """And nothing is lost that the publisher still had when it was asked."""
    order, publisher = BatchOrder(), Publisher(kept, 0)
    done: list[Action] = []
    needlessly: list[int] = []

    def do(actions: Sequence[Action]) -> None:
        for action in actions:
            done.append(action)
            if isinstance(action, Ask):
                there = [each for each in publisher.ring if each.number >= action.start] if answers else []
                for each in there:
                    made = order.again(each)
                    lost = [n for a in made if isinstance(a, Lost) for n in range(a.expected, a.got)]
                    needlessly.extend(set(lost) & {each.number for each in publisher.ring})
                    do(made)
                do(order.answer_ended())

    for step in steps:
        if step == "restart":
            publisher = Publisher(kept, publisher.life + 1)
        elif step == "looked":
            do(order.ask())
        else:
            made = publisher.publish()
            if step == "arrives":
                do(order.came(made))

    _check(done)
    assert [] == needlessly
    if "restart" not in steps and steps and steps[-1] == "arrives":
        assert publisher.next == order.expected, "all that was published is accounted for"


def _check(done: Sequence[Action]) -> None:
    """From any number to the next one, nothing is left out and nothing comes twice."""
    expected = 0
    for action in done:
        if isinstance(action, Take):
            assert expected == action.batch.number
            expected += 1
        elif isinstance(action, Lost):
            assert expected == action.expected
            expected = action.got if action.got > action.expected else 0
    lives = [int(action.batch.payload.split(b"/")[0]) for action in done if isinstance(action, Take)]
    assert sorted(lives) == lives
