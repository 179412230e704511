"""The suites say what they need where it is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

NEEDS = {
    "conformance": ["pytest"],
    "mutations": ["hypothesis"],
    "phases": ["pytest"],
    "registries": ["pytest"],
    "rules": ["pytest", "hypothesis"],
    "scorers": ["pytest", "hypothesis"],
}


@pytest.mark.parametrize(
    ("module", "package"), [(module, package) for module, needs in NEEDS.items() for package in needs]
)
def test_a_suite_without_its_package_says_what_to_install(module: str, package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import vswa_plugin.testing.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = done.stderr.strip().splitlines()[-1]

    assert 1 == done.returncode
    assert message.startswith("ImportError: ")
    assert package in message
    assert "pip install 'vswa-plugin[test]'" in message
