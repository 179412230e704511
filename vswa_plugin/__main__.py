"""``python -m vswa_plugin`` is the command ``vswa``."""

from __future__ import annotations

import sys

from vswa_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
