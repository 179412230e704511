"""A model by its name: out of the local cache, downloaded by the real client, or a line on what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

from tests.hub_server import COMMIT, TOKEN, Hub, Repository, serving
from vswa_plugin.errors import ConfigError
from vswa_plugin.program.model_path import find_model

SMALL = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 300, "num_hidden_layers": 2}
#: As a program of ours: one line and an exit code for what it refuses.
FIND = """
import sys
from vswa_plugin.program.model_path import find_model
from vswa_plugin.program.run import run_program
def find():
    found = find_model(sys.argv[1], "--model-path", lambda line: print("SAID", line))
    print("FOUND", found.name, found.path)
    return 0
sys.exit(run_program("vswa worker", find))
"""


class Found(NamedTuple):
    """:param path: None where it was refused.
    :param said: on both outputs.
    """

    code: int
    path: Path | None
    said: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Those of a model in two shards, and what a repository has besides."""
    directory = tmp_path_factory.mktemp("repository") / "model"
    make_checkpoint(directory, overrides=SMALL, shards=2)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    return files | {
        "pytorch_model.bin": b"a pickle",
        "modeling_evil.py": b"import os",
        "original/model.safetensors": b"another form",
        "README.md": b"# Model",
    }


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with serving({"acme/tiny": Repository(dict(files))}) as made:
        yield made


def find(given: str, hub: Hub | None, home: Path, **environ: str) -> Found:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    # Nothing listens on port 1, and nothing of an interrupted download is waited for.
    env |= {"HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:1", "HF_HOME": str(home)}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", FIND, given]
    done = subprocess.run(
        command, env={**env, **environ}, capture_output=True, text=True, timeout=55, cwd=home
    )
    path = next((line.split()[2] for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
    return Found(done.returncode, None if path is None else Path(path), done.stdout + done.stderr)


def assert_refused(found: Found, code: int, *named: str) -> None:
    lines = [line for line in found.said.splitlines() if line.startswith("vswa worker: ")]

    assert (code, None) == (found.code, found.path), found.said
    assert 1 == len(lines), found.said
    assert "Traceback" not in found.said
    for text in named:
        assert text in lines[0]


def test_a_model_is_downloaded_once_without_code_or_pickles_and_called_by_its_name(
    hub: Hub, tmp_path: Path
) -> None:
    first = find("acme/tiny", hub, tmp_path)
    assert first.path is not None, first.said
    got = {path.name for path in first.path.iterdir()}
    asked = hub.asked
    again = find("acme/tiny", hub, tmp_path)

    assert "FOUND acme/tiny " in first.said
    assert f"SAID acme/tiny: downloading it from {hub.url} to {tmp_path}" in first.said
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= got
    assert {f"model-0000{part}-of-00002.safetensors" for part in (1, 2)} < got
    assert not {"pytorch_model.bin", "modeling_evil.py", "original", "README.md"} & got
    assert not {"pytorch_model.bin", "modeling_evil.py", "original/model.safetensors"} & {*hub.taken}
    assert (first.path, asked) == (again.path, hub.asked), "the cache is asked first, and nobody else"
    assert "SAID" not in again.said


def test_what_the_cache_holds_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    path = find("acme/tiny", hub, tmp_path).path

    assert path == find("acme/tiny", None, tmp_path).path
    assert path == find("acme/tiny", None, tmp_path, HF_HUB_OFFLINE="1").path


def test_a_commit_can_be_pinned(hub: Hub, tmp_path: Path) -> None:
    found = find(f"acme/tiny@{COMMIT}", hub, tmp_path)

    assert found.path is not None, found.said
    assert COMMIT == found.path.name
    assert "FOUND acme/tiny " in found.said, "clients do not call it by a commit"
    assert found.path == find(f"acme/tiny@{COMMIT}", None, tmp_path).path


def test_a_revision_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    assert_refused(find("acme/tiny@v9", hub, tmp_path), 2, "branch, tag or commit", "'v9'")


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_name_that_the_hub_does_not_know_is_neither_path_nor_model(
    hub: Hub, tmp_path: Path, token: str | None
) -> None:
    environ = {} if token is None else {"HF_TOKEN": token}
    found = find("acme/huge", hub, tmp_path, **environ)

    assert_refused(found, 2, "--model-path acme/huge", "nothing is at that path", "no such model")
    assert ("set HF_TOKEN" in found.said) == (token is None)


def test_a_gated_model_needs_the_token_of_an_account_that_has_accepted_its_terms(
    hub: Hub, tmp_path: Path
) -> None:
    hub.repositories["acme/tiny"].gated = True
    terms = f"accept its terms at {hub.url}/acme/tiny, then set HF_TOKEN"

    assert_refused(find("acme/tiny", hub, tmp_path), 2, "gated", "there is no token", terms)
    refused = find("acme/tiny", hub, tmp_path, HF_TOKEN="hf_ofAnother")
    assert_refused(refused, 2, "gated", "has no access", terms)
    assert "hf_ofAnother" not in refused.said
    assert find("acme/tiny", hub, tmp_path, HF_TOKEN=TOKEN).path is not None


def test_an_interrupted_download_is_no_model_and_goes_on_later(hub: Hub, tmp_path: Path) -> None:
    repository, weights = hub.repositories["acme/tiny"], "model-00001-of-00002.safetensors"
    repository.cut[weights] = 0
    broken = find("acme/tiny", hub, tmp_path)
    assert_refused(
        broken, 1, "cannot be downloaded from", "try again, which goes on", "hf download acme/tiny"
    )
    assert_refused(find("acme/tiny", None, tmp_path, HF_HUB_OFFLINE="1"), 2, "HF_HUB_OFFLINE forbids")
    repository.cut.clear()
    hub.taken.clear()
    whole = find("acme/tiny", hub, tmp_path)

    assert whole.path is not None, whole.said
    assert repository.files[weights] == (whole.path / weights).read_bytes()
    assert "tokenizer.json" not in hub.taken, "what is there is not downloaded again"


def test_a_cache_that_lacks_a_part_is_completed_also_where_nothing_lists_its_files(
    hub: Hub, tmp_path: Path
) -> None:
    """As older versions of the client leave it, and a copy by hand."""
    path, weights = find("acme/tiny", hub, tmp_path).path, "model-00002-of-00002.safetensors"
    assert path is not None
    shutil.rmtree(path.parents[1] / "trees", ignore_errors=True)
    (path / weights).resolve().unlink()
    (path / weights).unlink()

    assert_refused(find("acme/tiny", None, tmp_path, HF_HUB_OFFLINE="1"), 2, "not whole in", "hf download")
    assert path == find("acme/tiny", hub, tmp_path).path
    assert (path / weights).is_file()


def test_without_a_network_the_line_says_what_to_do(tmp_path: Path) -> None:
    found = find("acme/tiny", None, tmp_path)

    assert_refused(
        found, 1, "http://127.0.0.1:1", "hf download acme/tiny", "HF_HOME", "the directory of the model"
    )


def test_offline_with_an_empty_cache_nothing_is_tried(hub: Hub, tmp_path: Path) -> None:
    assert_refused(find("acme/tiny", hub, tmp_path, HF_HUB_OFFLINE="1"), 2, "HF_HUB_OFFLINE", "hf download")
    assert 0 == hub.asked


@pytest.mark.parametrize("lacks", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_a_repository_without_a_part_of_a_model_is_refused_by_that_part(
    hub: Hub, tmp_path: Path, lacks: str
) -> None:
    del hub.repositories["acme/tiny"].files[lacks]

    assert_refused(find("acme/tiny", hub, tmp_path), 2, f"without {lacks}")


def test_a_path_that_exists_is_never_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert (tmp_path / "acme" / "tiny", "tiny") == find_model("acme/tiny", "--model", pytest.fail)


@pytest.mark.parametrize(
    "given", ["/proc/nowhere/at/all", "./acme/tiny", "tiny", "a/b/c", "a\0b", "a" * 9_000, "a/b@"]
)
def test_what_is_neither_path_nor_name_is_refused_without_a_search(given: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--model: expected a model at .* got nothing there; `vswa make-model"
    ) as error:
        find_model(given, "--model", pytest.fail)

    assert len(str(error.value)) < 600


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vswa_plugin.program.model_path.find_spec", lambda _: None)

    with pytest.raises(ConfigError, match=r"pip install 'vswa-plugin\[hub\]', or give the directory"):
        find_model("acme/tiny", "--model", pytest.fail)


def test_a_model_of_the_cache_is_what_a_worker_and_a_deployment_start(hub: Hub, tmp_path: Path) -> None:
    """The guide's own way: MODEL_PATH is a name. Nothing is started: the settings are looked at."""
    found = find("acme/tiny", hub, tmp_path)
    code = (
        "import json, os; from vswa_plugin.launch.__main__ import settings_from; "
        "from vswa_plugin.worker.args import parse; s, _ = settings_from(['agg'], os.environ); "
        "w = parse(['--model-path', 'acme/tiny']); "
        "print(json.dumps([s.model_path, s.served_model_name, w.settings.model_path, "
        "w.settings.served_model_name]))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "MODEL_PATH": "acme/tiny"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=55)

    assert [str(found.path), "acme/tiny"] * 2 == json.loads(done.stdout), done.stderr
