"""Where engines exchange what they need for NIXL, which vLLM takes from the environment alone."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
from collections.abc import Iterator, Mapping

from vswa_plugin.errors import ConfigError

logger = logging.getLogger(__name__)

HOST, PORT = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"
#: vLLM's own default, which only engines of the same machine reach.
DEFAULT_HOST = "localhost"
#: Below the ports that a system gives to clients. vLLM's default is one number, which a second engine finds
#: taken.
_PORTS = range(20_000, 32_000)
_TRIES = 100


@contextlib.contextmanager
def side_channel(ranks: int, environ: Mapping[str, str] | None = None) -> Iterator[None]:
    """For processes that start meanwhile: the user's host and port, else vLLM's host and free ports.

    :param ranks: each rank listens on the port plus its number.
    :raises ConfigError: the user's port is no number.
    """
    given = os.environ if environ is None else environ
    host = given.get(HOST) or DEFAULT_HOST
    port = _number(given[PORT], ranks) if given.get(PORT) else _free(host, ranks)
    logger.info("NIXL's side channel: %s, port %d%s", host, port, f" to {port + ranks - 1}" * (ranks > 1))
    if host == DEFAULT_HOST:
        logger.info("workers of other machines cannot reach it; set %s to an address of this machine", HOST)
    before = {name: os.environ.get(name) for name in (HOST, PORT)}
    os.environ.update({HOST: host, PORT: str(port)})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _number(text: str, ranks: int) -> int:
    most = 65_536 - ranks
    if not text.isdecimal() or not 0 < int(text) <= most:
        raise ConfigError(
            f"{PORT}: expected a port from 1 to {most}, got {text!r}; each rank adds its number"
        )
    return int(text)


def _free(host: str, ranks: int) -> int:
    for _ in range(_TRIES):
        port = random.randrange(_PORTS.start, _PORTS.stop - ranks)
        if all(_is_free(host, port + rank) for rank in range(ranks)):
            return port
    raise ConfigError(
        f"{HOST}: expected an address of this machine with free ports from {_PORTS.start} to {_PORTS.stop}, "
        f"got {host}; set {PORT} to a port of your own"
    )


def _is_free(host: str, port: int) -> bool:
    try:
        with socket.create_server((host, port)):
            return True
    except OSError:
        return False
