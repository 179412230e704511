"""A file of scrape targets for Prometheus (``file_sd_configs``): where each process has its metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

TARGETS = "prometheus-targets.json"


def scrape_targets(urls: Mapping[str, str]) -> list[dict[str, object]]:
    """:param urls: by name of the process, such as ``worker-0``; its metrics are under ``/metrics``."""
    return [
        {"targets": [urlsplit(url).netloc], "labels": {"job": "vswa", "name": name}}
        for name, url in urls.items()
    ]


def write_targets(folder: Path, urls: Mapping[str, str]) -> Path:
    """Write the file into ``folder``, whole at any time: Prometheus may read it now. Returns its path."""
    path = folder / TARGETS
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(scrape_targets(urls), indent=1) + "\n", "utf-8")
    os.replace(beside, path)
    return path
