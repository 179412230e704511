"""``vswa new-plugin``: a package with one plugin of a kind, made from the template, whose tests pass."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.host.sources import installed, package_of

_EXAMPLES = """\
examples:
  vswa new-plugin quotas --kind observer           writes ./vswa-quotas
  vswa new-plugin myengine --kind engine --directory ~/src/myengine

The tutorial in docs/writing-plugins.md goes on from there.
"""
#: Kind -> its one-line help.
KINDS: Mapping[str, str] = {
    "observer": "watches requests and events, and adds metrics",
    "engine": "serves a model, and announces its KV events",
    "rule": "says how far an engine can resume a prompt",
    "scorer": "predicts reuse, to be compared on recorded traces",
    "cost": "adds a term to the router's cost of each worker",
}
#: Kind -> the class of its module that hosts make an instance of; of the others the module is the plugin.
_CLASSES = {"cost": "ExampleCost"}
#: What the template is called; in each kind but the first, the module has the kind's name at its end.
_TEMPLATE = "example"
_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
_MOST = 40


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("name", metavar="NAME", help="of the plugin: lower-case letters, digits, - or _")
    parser.add_argument(
        "--kind",
        required=True,
        choices=list(KINDS),
        help="; ".join(f"{kind}: {text}" for kind, text in KINDS.items()),
    )
    parser.add_argument(
        "--directory", metavar="DIR", help="where it is written; new or empty (default: ./vswa-NAME)"
    )


def run(args: argparse.Namespace) -> int:
    name = plugin_name(args.name)
    directory = Path(args.directory or f"vswa-{name.replace('_', '-')}")
    files = package(name, args.kind)
    write(directory, files)
    print(f"{directory} has a plugin of the kind {args.kind}, which {KINDS[args.kind]}:\n")
    for path in files:
        print(f"  {path}")
    steps = (
        "cd " + str(directory),
        "pip install -e '.[test]'",
        "pytest",
        f"vswa plugins    # lists it as {name}",
    )
    print("", *steps, sep="\n  ")
    return 0


def plugin_name(given: str) -> str:
    """The name as ``vswa plugins`` lists it.

    :raises ConfigError: it is no name, or another plugin has it.
    """
    bare = given.removeprefix("vswa-").removeprefix("vswa_")
    if not _NAME.fullmatch(bare) or len(bare) > _MOST:
        raise ConfigError(
            f"NAME: expected up to {_MOST} lower-case letters and digits, with - or _ between them and a "
            f"letter first, got {shown(given)}"
        )
    name = bare.replace("-", "_")
    for entry in installed():
        if entry.name == name:
            raise ConfigError(
                f"NAME: expected one that no plugin here has, got {name!r}, which {package_of(entry)} brings"
            )
    return name


def package(name: str, kind: str) -> dict[str, str]:
    """The files of a package, by path in it.

    :param name: as :func:`plugin_name` returns it.
    """
    template = _template()
    module = f"vswa_{_TEMPLATE}" if kind == "observer" else f"vswa_{_TEMPLATE}_{kind}"
    code = (template / module / "__init__.py").read_text("utf-8")
    files = {
        "README.md": (template / "README.md").read_text("utf-8"),
        "pyproject.toml": (template / "pyproject.toml").read_text("utf-8"),
        f"vswa_{name}/__init__.py": code,
        f"tests/test_{name}.py": (template / "tests" / f"test_{kind}.py").read_text("utf-8"),
    }
    observer = ast.get_docstring(
        ast.parse((template / f"vswa_{_TEMPLATE}" / "__init__.py").read_text("utf-8"))
    )
    about = ast.get_docstring(ast.parse(code))
    assert observer is not None and about is not None
    entry = f'{_TEMPLATE} = "vswa_{_TEMPLATE}'
    renamed = {
        observer.rstrip("."): about.rstrip("."),
        module: f"vswa_{name}",
        f"vswa-{_TEMPLATE}": f"vswa-{name.replace('_', '-')}",
        f"vswa_{_TEMPLATE}": f"vswa_{name}",
        _TEMPLATE.upper(): name.upper(),
        _TEMPLATE.capitalize(): "".join(map(str.capitalize, name.split("_"))),
        _TEMPLATE: name,
    }
    if kind in _CLASSES:
        files["pyproject.toml"] = files["pyproject.toml"].replace(entry, f"{entry}:{_CLASSES[kind]}")
    return {path: _replaced(text, renamed) for path, text in files.items()}


def write(directory: Path, files: Mapping[str, str]) -> None:
    """Write ``files`` below ``directory``, which is made where it is not there.

    :raises ConfigError: it has something in it, or cannot be written.
    """
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ConfigError(
                f"--directory: expected a new or an empty one, got {directory}, which is not; choose another"
            )
        for path, text in files.items():
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, "utf-8")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise ConfigError(f"--directory: expected one that can be written, got: {error}") from error


def _replaced(text: str, renamed: Mapping[str, str]) -> str:
    """Each key by its value, in one pass, so that what was put in is left alone; longer ones go first."""
    pattern = "|".join(map(re.escape, sorted(renamed, key=len, reverse=True)))
    return re.sub(pattern, lambda match: renamed[match.group()], text)


def _template() -> Path:
    """The folder ``template`` beside the plugins that come with this package."""
    spec = find_spec("vswa_plugins")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (folder := Path(place) / "template").is_dir():
            return folder
    raise ConfigError(
        "expected the template of plugins beside vswa_plugins, got none; install the package again"
    )
