"""Runs the tests of faulty subclasses of a conformance suite in a process apart, and says which failed."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def failures(module: str, folder: Path, faults: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Class -> names of its tests that failed, without parameters that ``faults`` does not name.

    :param module: a file in this folder that pytest does not collect by itself, as its tests must fail. Its
        class TestSound is without a fault and runs as a whole.
    :param folder: where the results are written.
    :param faults: class -> the checks to run of it, with or without ``[parameter]``.
    """
    path = Path(__file__).with_name(module)
    results = folder / "results.xml"
    nodes = ["TestSound", *(f"{name}::{each}" for name, checks in faults.items() for each in sorted(checks))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
    command += [f"{path}::{node}" for node in nodes]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout + run.stderr
    failed: dict[str, set[str]] = defaultdict(set)
    for case in ET.parse(results).iter("testcase"):
        assert case.find("error") is None, run.stdout
        kind, test = case.attrib["classname"].rpartition(".")[2], case.attrib["name"]
        tests = failed[kind]
        if case.find("failure") is not None:
            tests.add(test if test in faults.get(kind, ()) else test.partition("[")[0])
    return dict(failed)
