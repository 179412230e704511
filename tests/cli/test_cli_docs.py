"""docs/cli.md against the command lines: every command, its purpose, its options, its exit codes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vswa_plugin.cli.parsers import GLOBAL_OPTIONS, full_parser
from vswa_plugin.host.loading import load_host
from vswa_plugin.program.run import EXIT_CODES

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text("utf-8")


def subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Name, help and parser; of a command that has subcommands, these."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: str(choice.help) for choice in action._choices_actions}
            for name, below in action.choices.items():
                inner = list(subcommands(below))
                yield from ((f"{name} {each}", *rest) for each, *rest in inner)  # type: ignore[misc]
                if not inner:
                    yield name, helps[name], below


@pytest.fixture(scope="module")
def commands() -> dict[str, tuple[str, set[str]]]:
    """Name -> help and long options, but for those that all have."""
    with load_host(environ={}) as host:
        parser = full_parser(host)
    found = {}
    for name, text, below in subcommands(parser):
        options = {
            option
            for action in below._actions
            for option in action.option_strings
            if option.startswith("--")
            and action.help is not argparse.SUPPRESS  # of Dynamo, on a page of their own
            and not (isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-"))
        }
        found[name] = text, options - {"--help", "--version"}
    return found


def sections() -> dict[str, list[str]]:
    """Name -> the paragraphs of its section, each on one line."""
    parts = re.split(r"^### vswa (.+)$", PAGE, flags=re.M)[1:]
    return {
        name: [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def options_in(text: str) -> set[str]:
    return set(re.findall(r"`(--[a-z][a-z0-9-]*)`", text))


def test_every_command_has_a_section_that_begins_with_its_help(
    commands: dict[str, tuple[str, set[str]]],
) -> None:
    assert {name: text for name, (text, _) in commands.items()} == {
        name: paragraphs[0] for name, paragraphs in sections().items()
    }


def test_every_section_lists_all_options_of_its_command(commands: dict[str, tuple[str, set[str]]]) -> None:
    listed = {
        name: {option for each in paragraphs if each.startswith("Options: ") for option in options_in(each)}
        for name, paragraphs in sections().items()
    }

    assert {name: options for name, (_, options) in commands.items()} == listed


def test_no_section_speaks_of_an_option_that_its_command_does_not_have(
    commands: dict[str, tuple[str, set[str]]],
) -> None:
    for name, paragraphs in sections().items():
        known = commands[name][1] | {*GLOBAL_OPTIONS, *(["--selector-only"] if name == "selector" else [])}
        assert set() == options_in(" ".join(paragraphs)) - known, name


def test_every_section_ends_with_exit_codes_of_the_convention() -> None:
    for name, paragraphs in sections().items():
        assert paragraphs[-1].startswith("Exit codes: 0"), name
        codes = [int(code) for code in re.findall(r"(?:^Exit codes: |; )(\d+)\b", paragraphs[-1])]
        assert codes == sorted(set(codes) & set(EXIT_CODES)), name


def test_the_table_of_exit_codes_is_that_of_the_programs() -> None:
    table = re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, re.M)

    assert list(EXIT_CODES.items()) == [(int(code), when) for code, when in table]
