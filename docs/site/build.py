"""Builds the documentation as a site: ``make docs``; the result is build/site/html/index.html.

The pages lie where GitHub shows them, with links between them and to files of the tree. This script copies
the pages of ``mkdocs.yml``, all other pages of ``docs``, and whatever they link to, to a folder of their own
under the same paths, so that MkDocs sees one tree in which every link and anchor is checked.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SETTINGS = Path(__file__).parent / "mkdocs.yml"
#: The text, the target and the anchor of a link or a picture.
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"^(```.*?^```$|(?: {4}|\t)[^\n]*$)", re.S | re.M)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", metavar="DIR")
    out: Path = parser.parse_args().out
    settings = stage(out)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(settings)]
    # The theme's notice about another generator is no fault of a page.
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environ, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
    else:
        sys.stdout.write(f"{settings.parent / 'html' / 'index.html'}\n")
    return done.returncode


def stage(out: Path) -> Path:
    """Copy all pages to ``out``/source and write the settings beside; returns the settings' path."""
    source = out / "source"
    shutil.rmtree(out, ignore_errors=True)
    settings = yaml.safe_load(SETTINGS.read_text("utf-8"))
    named = list(_named(settings["nav"]))
    others = [page for page in map(_relative, sorted((ROOT / "docs").rglob("*.md"))) if page not in named]
    # A page that nobody has given a place yet is not lost.
    if others:
        settings["nav"].append({"More": others})
    seen: set[str] = set()
    waiting = [*named, *others]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        target = source / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".md"):
            text, linked = _page(path)
            target.write_text(text, "utf-8")
            waiting += linked
        else:
            shutil.copyfile(ROOT / path, target)
    settings["docs_dir"], settings["site_dir"] = str(source.resolve()), str((out / "html").resolve())
    written = out / "mkdocs.yml"
    written.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    return written


def _page(path: str) -> tuple[str, list[str]]:
    """A page, in which links to folders lead to their READMEs, and the files that it links to."""
    here = (ROOT / path).parent
    linked: list[str] = []

    def resolved(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        target = here / link
        if target.is_dir():
            if not (target / "README.md").is_file():
                return text  # a folder without a page: there is nothing to show
            link, target = f"{link.rstrip('/')}/README.md", target / "README.md"
        if target.is_file():
            linked.append(_relative(target))
        return f"[{text}]({link}{anchor})"  # where nothing is there, MkDocs says so

    text = (ROOT / path).read_text("utf-8")
    parts = re.split(_CODE, text)
    return "".join(part if at % 2 else _LINK.sub(resolved, part) for at, part in enumerate(parts)), linked


def _named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for below in nav.values():
            yield from _named(below)
    else:
        for each in nav:
            yield from _named(each)


def _relative(path: Path) -> str:
    return path.resolve().relative_to(ROOT).as_posix()


if __name__ == "__main__":
    sys.exit(main())
