"""Numbers of command lines and of the environment: ASCII digits alone."""

from __future__ import annotations

import pytest

from vswa_plugin.errors import ConfigError
from vswa_plugin.program.options import read_number
from vswa_plugin.router import args as router_args
from vswa_plugin.worker import args as worker_args


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-3", -3), ("+7", 7), ("8000", 8000)])
def test_a_number_in_ascii_digits_is_read(text: str, value: int) -> None:
    assert value == read_number(text, int)
    assert value == read_number(text, float)


@pytest.mark.parametrize("text", ["٨٠٠٠", "８０", "1_000", " 1", "1\n", "\u00a01", "", "x"])
def test_what_python_alone_would_read_besides_is_none(text: str) -> None:
    for kind in (int, float):
        with pytest.raises(ValueError):
            read_number(text, kind)


def test_a_fraction_is_a_number_and_no_whole_one() -> None:
    assert 0.5 == read_number("5e-1", float)
    with pytest.raises(ValueError):
        read_number("5e-1", int)


@pytest.mark.parametrize(("program", "variable"), [("worker", "drain"), ("router", "DYN_ROUTER_TEMPERATURE")])
def test_variables_are_read_alike(program: str, variable: str) -> None:
    with pytest.raises(ConfigError, match=r"expected (seconds|a number), got '٩'"):
        if program == "worker":
            worker_args.parse(["--model-path", "/x"], {worker_args._DRAIN_ENV: "٩"})
        else:
            router_args.parse([], {variable: "٩"})
