"""Where events are published: as the user says, else in a directory of the worker."""

from __future__ import annotations

import pytest
from vswa_plugins.vllm.launching import event_sockets
from vswa_plugins.vllm.options import parse_options
from vswa_plugins.vllm.sockets import Sockets, private_sockets

from vswa_plugin.errors import ConfigError

LONG = "/" + "d" * 200
GIVEN = {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}


def sockets(directory: str, **given: str) -> Sockets:
    return event_sockets(parse_options({"kv_events_config": given}, "args.yaml", ()), directory)


def test_what_the_user_does_not_give_is_in_the_directory() -> None:
    private = private_sockets("/tmp/x")
    assert private is not None

    assert private == sockets("/tmp/x")
    assert private._replace(endpoint="tcp://*:5557") == sockets("/tmp/x", endpoint="tcp://*:5557")
    assert private._replace(replay_endpoint="tcp://*:5558") == sockets(
        "/tmp/x", replay_endpoint="tcp://*:5558"
    )


def test_the_name_of_the_directory_does_not_matter_where_both_are_given() -> None:
    assert Sockets(**GIVEN) == sockets(LONG, **GIVEN) == sockets("/tmp/x", **GIVEN)


@pytest.mark.parametrize("given", [{}, {"endpoint": GIVEN["endpoint"]}], ids=str)
def test_a_directory_with_too_long_a_name_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="TMPDIR: expected a directory with a short name"):
        sockets(LONG, **given)
