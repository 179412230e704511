"""``python -m vswa_plugin.launch.reaper FOLDER``: cleans up after the program that has started it.

It waits until its standard input ends, which is when that program has ended. Where the program has said that
it has cleaned up by itself, nothing is left to do. See scratch.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vswa_plugin.launch.scratch import CLEANED, clean


def main() -> None:
    folder = Path(sys.argv[1])
    if sys.stdin.buffer.read() != CLEANED:
        clean(folder)


if __name__ == "__main__":
    main()
