"""Reports for people: terminal tables, progress bars, plots. What they need is imported when it is used."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vswa_plugin.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

#: What plots are written as.
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def console() -> Console:
    """Standard output, without markup."""
    from rich.console import Console

    # A pipe has no width, and tools such as grep need whole lines.
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)


def table(headings: Sequence[str], *, terminal: bool) -> Table:
    """An empty one; all but the first column are numbers."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return shown


def add_row(shown: Table, cells: Sequence[str]) -> None:
    """Print the lines as they are: rich neither wraps nor marks them up."""
    from rich.text import Text

    shown.add_row(*map(Text, cells))


@contextmanager
def progress(*, counted: bool = False) -> Iterator[Progress]:
    """A bar on a terminal's standard error, which goes when it is done.

    :param counted: show how many of how many.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = (MofNCompleteColumn(),) if counted else ()
    columns = (TextColumn("{task.description}"), BarColumn(), *count, TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def check_plot(path: Path) -> None:
    """Before long work: whether its result can be drawn.

    :raises ConfigError: matplotlib is not installed, or no such file could be written.
    """
    _figures()
    if path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot: expected a file that ends in {', '.join(PLOT_SUFFIXES)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: cannot write {path}: there is no directory {path.parent}")


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches.

    :raises ConfigError: matplotlib is not installed.
    """
    return _figures().Figure(figsize=(width, height))


def save(drawn: Any, path: Path, below: float = 0.0) -> None:
    """Write a figure.

    :param below: share of its height to keep free at the bottom.
    :raises ConfigError: the file cannot be written.
    """
    drawn.tight_layout(rect=(0, below, 1, 1))
    try:
        drawn.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: cannot write {path}: {error}") from error


def _figures() -> Any:
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib: pip install 'vswa-plugin[plot]'. The numbers themselves need nothing: "
            "leave --plot out, or use --json"
        ) from error
