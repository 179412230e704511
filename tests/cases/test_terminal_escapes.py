"""What others put into a message or a registry entry reaches a terminal as text, never as a command to it."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from tests.cases.follower_helpers import Followed, entry_of, run_in_jumps
from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.cli.events import Follower
from vswa_plugin.cli.index import _table
from vswa_plugin.errors import ConfigError, ProtocolError, one_line, plain
from vswa_plugin.following.fleet import RankStatus
from vswa_plugin.index import WindowIndex
from vswa_plugin.program.run import PlainFormatter, _say
from vswa_plugin.registry import decode_entry, encode_entry
from vswa_plugin.wire.events import Batch, Layout, Moved, Rank, Source, Stored, Unknown

#: Sets the title of a terminal, turns text red, and hides what follows, each in several spellings.
EVIL = "gem\x1b]0;owned\x07\x1b[31mma\x9b31m\x08\r\n\u202e"
SOURCE = Source("ns", "backend", 7)


def steers(text: str) -> list[str]:
    """Characters that are not for reading, but for line ends."""
    return [each for each in text if not (each.isprintable() or each == "\n")]


def test_what_is_no_text_is_written_out() -> None:
    assert [] == steers(plain(EVIL)) == steers(one_line(EVIL))
    assert "\\x1b[31mma" in plain(EVIL)
    assert "Überschrift\n\tund 日本語 🎉" == plain("Überschrift\n\tund 日本語 🎉")


def test_events_are_shown_as_one_line_each_without_escapes() -> None:
    layout = Layout((CacheGroup(0, None, 32, EVIL),), EVIL, EVIL, EVIL)
    events = (layout, Stored(0, 0, None, (1,), EVIL), Moved(0, (1,), EVIL), Unknown(EVIL))
    follower = Follower()
    lines = follower.lines(SOURCE, follower.read(SOURCE, Batch(1, 5, 0, 0, events)))

    assert 4 == len(lines)
    assert [] == steers("".join(lines))


@pytest.mark.parametrize("model", [EVIL, "[red]gemma[/red]", "[link=https://evil.example]gemma[/link]"])
def test_the_table_of_ranks_shows_names_as_they_are(model: str) -> None:
    blocks = {"global": {EVIL: 1}}
    status = RankStatus(SOURCE, model, "live", EVIL, True, 5, 1, None, blocks)
    console = Console(file=io.StringIO(), width=300, force_terminal=True, color_system=None, highlight=False)
    console.print(_table([status], WindowIndex().stats(), terminal=True))
    shown = console.file.getvalue()  # type: ignore[attr-defined]

    assert [] == steers(shown)
    assert one_line(model) in shown


def test_a_program_logs_what_it_hears_of_a_rank_without_escapes() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(PlainFormatter("%(message)s"))
    logger = logging.getLogger("vswa_plugin.following")
    logger.addHandler(handler)

    async def body() -> None:
        async with Followed() as followed:
            strange = Layout((CacheGroup(0, None, 32, EVIL),), "trtllm_v2", "h", EVIL)
            await followed.transport.hear(Rank(2), 0, strange)
            await followed.transport.hear(Rank(3), 0, Layout((CacheGroup(0, None, 32),), EVIL, "h", "m"))
            await followed.transport.hear(Rank(4), 0, Unknown(EVIL))  # type: ignore[arg-type]
            await followed.transport.deliver("vswa.v1.ns.backend.5\x1b[31m.0.events", b"")

    try:
        run_in_jumps(body())
    finally:
        logger.removeHandler(handler)

    assert 3 <= len(written.getvalue().splitlines())
    assert [] == steers(written.getvalue())


def test_an_error_of_a_command_has_no_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    _say("vswa", ConfigError(f"expected a name, got {EVIL}"))
    _say("vswa", RuntimeError(EVIL))

    assert [] == steers(capsys.readouterr().err)


def test_a_registry_entry_with_escapes_is_refused_or_taken_as_text() -> None:
    entry = entry_of(7, served_model_name=EVIL, host=EVIL, model_path=EVIL)
    assert EVIL == decode_entry(entry.key, encode_entry(entry)).served_model_name

    odd = entry_of(7, namespace=EVIL)
    with pytest.raises(ProtocolError) as refused:
        decode_entry(entry.key, encode_entry(odd))
    assert [] == steers(str(refused.value))
