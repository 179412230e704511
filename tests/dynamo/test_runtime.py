"""Errors of Dynamo's runtime, which are plain Exception, and Dynamo's own refusals provoked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from vswa_plugin.dynamo.names import EndpointName
from vswa_plugin.dynamo.runtime import check_release, other_model, run_on_uvloop, runtime_error
from vswa_plugin.errors import ConfigError

ENDPOINT = EndpointName("ns", "backend", "generate")
#: Variables that Dynamo's runtime refuses in its own words, each with a word of them.
REFUSED = {
    "DYN_DISCOVERY_BACKEND": ("nonsense", "nonsense"),
    "DYN_REQUEST_PLANE": ("nonsense", "nonsense"),
    "DYN_SYSTEM_PORT": ("99999", "SYSTEM_PORT"),
    "DYN_RUNTIME_NUM_WORKER_THREADS": ("0", "num_worker_threads"),
}
CONNECT = """
import asyncio, sys
from vswa_plugin.dynamo.runtime import connect
from vswa_plugin.program.run import run_program

async def main():
    connect()
    return 0

sys.exit(run_program("vswa worker", lambda: asyncio.run(main())))
"""


def connecting(environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the runtime is one per process."""
    env = {**os.environ, "DYN_DISCOVERY_BACKEND": "mem", "DYN_LOG": "error", **environ}
    return subprocess.run(
        [sys.executable, "-c", CONNECT], env=env, capture_output=True, text=True, timeout=50
    )


@pytest.mark.parametrize("variable", REFUSED)
def test_a_variable_that_dynamos_runtime_refuses_ends_a_program_with_one_line_and_code_2(
    variable: str,
) -> None:
    value, word = REFUSED[variable]
    done = connecting({variable: value})

    assert (2, False) == (done.returncode, "Traceback" in done.stderr), done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("vswa worker: error: Dynamo's runtime refuses a setting")
    assert word in line


def test_what_is_no_setting_is_a_failure() -> None:
    error = runtime_error("Dynamo's runtime", Exception("lease\nexpired"))

    assert not isinstance(error, ConfigError)
    assert "Dynamo's runtime has failed: lease expired" == str(error)


def test_another_model_on_an_endpoint_is_named_with_both_names_and_what_to_do() -> None:
    assert (
        "--served-model-name: expected 'one', which other workers show on ns.backend.generate, got 'two'; "
        "give this worker that name, or an endpoint or namespace of its own (--endpoint, DYN_NAMESPACE)"
    ) == str(other_model("two", "one", ENDPOINT))


# -- releases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.6.0", "1.6.1", "1.6.2.post1", "1.6.17", "1.6.1.dev20261101"])
def test_a_release_of_the_line_is_taken(version: str) -> None:
    check_release(version)


@pytest.mark.parametrize(
    "version",
    ["1.5.1", "1.60.0", "1.7.0", "1.7.0.dev20261026", "1.6.0.dev20261023", "2.6.1", "0.9.1", "main"],
)
def test_another_release_is_refused_with_the_command_that_installs_one(version: str) -> None:
    words = rf"expected a release of 1\.6 .*, got {version}; pip install 'ai-dynamo-runtime>=1.6.0,<1.7'"
    with pytest.raises(ConfigError, match=words):
        check_release(version)


def test_a_program_ends_before_it_begins_on_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    async def begins() -> int:
        raise AssertionError("it has begun")

    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.5.1")
    with pytest.raises(ConfigError, match=r"got 1\.5\.1"):
        run_on_uvloop(begins())
