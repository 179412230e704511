"""docs/site/build.py: which pages come to the site, and what their links lead to."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ONE = (
    "[code](../plugins/mine/code.py) [gone](gone.md)\n\n    [set](in.md)\n\n"
    "```\n[fenced](in.md)\n```\n[mine](../plugins/mine)\n"
)
FOLDER = Path(__file__).parents[2] / "docs/site"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, over a tree of a few pages."""
    spec = importlib.util.spec_from_file_location("site_build", FOLDER / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "tree"
    for path, text in {
        "README.md": "[docs](docs/one.md) ![x](docs/x.png) [it](plugins/mine) [web](https://a.example)",
        "docs/one.md": ONE,
        "docs/deep/two.md": "[up](../one.md) [bare](../../empty)",
        "docs/x.png": "",
        "plugins/mine/README.md": "mine",
        "plugins/mine/code.py": "",
        "plugins/other/README.md": "nobody links here",
        "empty/file": "",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    settings = tmp_path / "mkdocs.yml"
    settings.write_text("nav: [{Home: README.md}, {Start: [docs/one.md]}]\n")
    monkeypatch.setattr(module, "ROOT", root.resolve())
    monkeypatch.setattr(module, "SETTINGS", settings)
    return module


def test_named_pages_all_others_of_docs_and_what_they_link_to_are_on_the_site(
    build: ModuleType, tmp_path: Path
) -> None:
    settings = yaml.safe_load(build.stage(tmp_path / "out").read_text())
    source = Path(settings["docs_dir"])
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}

    assert files == {
        "README.md",
        "docs/one.md",
        "docs/deep/two.md",
        "docs/x.png",
        "plugins/mine/README.md",
        "plugins/mine/code.py",
    }
    assert [{"Home": "README.md"}, {"Start": ["docs/one.md"]}, {"More": ["docs/deep/two.md"]}] == settings[
        "nav"
    ]


def test_a_link_to_a_folder_leads_to_its_page_and_code_is_left_alone(
    build: ModuleType, tmp_path: Path
) -> None:
    build.stage(tmp_path / "out")
    home, one, two = (
        (tmp_path / "out/source" / path).read_text()
        for path in ("README.md", "docs/one.md", "docs/deep/two.md")
    )

    assert "[it](plugins/mine/README.md)" in home
    assert "[gone](gone.md)" in one, "what leads nowhere is for MkDocs to refuse"
    assert "    [set](in.md)" in one and "\n[fenced](in.md)\n" in one
    assert one.endswith("[mine](../plugins/mine/README.md)\n"), "what follows code is no code"
    assert two.endswith(" bare")


def test_every_page_of_the_navigation_is_there() -> None:
    def named(nav: object) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        below = nav.values() if isinstance(nav, dict) else nav
        assert isinstance(nav, dict | list)
        return [page for each in below for page in named(each)]

    pages = named(yaml.safe_load((FOLDER / "mkdocs.yml").read_text())["nav"])

    assert [] == [page for page in pages if not (FOLDER.parents[1] / page).is_file()]
    assert len(pages) == len(set(pages))
