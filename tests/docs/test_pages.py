"""What all pages have in common: their commands are ones that there are, their code is code, names exist."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import two_windows
from vswa_plugin.cli.parsers import full_parser
from vswa_plugin.host.loading import load_host

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Fenced blocks with their language, and blocks that are set in by four spaces.
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|((?:^ {4}.*\n|^\n(?= {4}))+)", re.M | re.S)
_SETTING = re.compile(r"[A-Z][A-Z0-9_]*=.*")
MAKE_TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language (empty for blocks that are set in) and text."""
    for match in _BLOCK.finditer(page.read_text("utf-8")):
        yield match[1] or "", match[2] if match[3] is None else match[3]


def commands(page: Path) -> Iterator[str]:
    """Lines that people type: also what follows a prompt, and lines that go on after a backslash."""
    for language, text in blocks(page):
        if language in ("", "bash", "sh", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                yield from re.split(r" && | \| ", line.strip().removeprefix("$ "))


def ours(line: str) -> list[str] | None:
    """The words of a command of this project, without settings before it; None: it is another one."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None  # output, or a part of a longer quotation
    while words and _SETTING.fullmatch(words[0]):
        words.pop(0)
    if words[:1] == ["vswa"]:
        return words[1:]
    if words[:2] in (["python", "-m"], ["python3", "-m"]) and len(words) > 2:
        package, _, program = words[2].partition(".")
        if package == "vswa_plugin":
            return [program, *words[3:]] if program else words[3:]
    return None


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    with load_host(environ={}) as host:
        return full_parser(host)


def refused(parser: argparse.ArgumentParser, words: list[str]) -> list[tuple[list[str], str]]:
    """The command with the last line of its refusal; empty: it is taken."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parser.parse_args(words)
    except SystemExit as ended:
        if ended.code:
            return [(words, said.getvalue().splitlines()[-1])]
    return []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_one_that_there_is(page: Path, parser: argparse.ArgumentParser) -> None:
    wrong: list[tuple[list[str], str]] = []
    for line in commands(page):
        words = ours(line)
        if words is None or "|" in words or any(word.startswith("[") for word in words):
            continue
        words = [word for word in words if word not in ("...", "…")]
        words = words[: words.index(">")] if ">" in words else words
        if words[:1] == ["launch"] and "--" in words:  # the rest is for the workers
            at = words.index("--")
            wrong += refused(parser, ["worker", "--model-path", "m", *words[at + 1 :]])
            words = words[:at]
        wrong += refused(parser, words)

    assert [] == wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_of_make_on_a_page_is_one_that_there_is(page: Path) -> None:
    named = {
        word
        for line in commands(page)
        if line.startswith("make ")
        for word in shlex.split(line, comments=True)[1:2]
        if "=" not in word
    }

    assert set() == named - MAKE_TARGETS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_on_a_page_is_code(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            compile(text, str(page), "exec")
        elif language == "json":
            json.loads(text)


def test_there_are_commands_on_the_pages() -> None:
    assert 60 < sum(ours(line) is not None for page in PAGES for line in commands(page))


def test_metrics_that_pages_name_are_on_the_page_of_metrics() -> None:
    known = set(re.findall(r"`(vswa_\w+)`", (ROOT / "docs" / "metrics.md").read_text()))
    for name in ("troubleshooting.md", "concepts.md", "quickstart.md", "when-not.md"):
        text = (ROOT / "docs" / name).read_text()
        assert set() == set(re.findall(r"`(vswa_\w+)`", text)) - known, name


def test_the_picture_of_two_windows_is_what_the_rule_says() -> None:
    assert two_windows.picture() == (ROOT / "docs" / "two-windows.svg").read_text("utf-8"), (
        "run: python -m tests.two_windows > docs/two-windows.svg"
    )
    assert [8, 5] == [two_windows.reused(blocks)[0] for blocks in (8, 6)], "as README and concepts.md say"
