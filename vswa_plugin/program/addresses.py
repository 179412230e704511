"""Addresses to listen on: checked before a program has started anything else."""

from __future__ import annotations

import errno
import socket

from vswa_plugin.errors import ConfigError, shown

#: The system's reasons that are about the host rather than the port.
_OF_HOST = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def check_address(
    host: str, port: int, *, host_option: str = "--http-host", port_option: str = "--http-port"
) -> str:
    """The numeric address of ``host``, on which a server can listen on ``port`` right now.

    :param port: 0: any.
    :raises ConfigError: names the option that is wrong, what came, and what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that is none, such as a very long one
        raise ConfigError(
            f"{host_option}: expected an address of this machine, got {shown(host)}: {error}"
        ) from error
    family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    if not host:
        raise ConfigError(f"{host_option}: expected an address of this machine, got nothing")
    with socket.socket(family) as probe:
        # As servers do: connections of a former server that are not quite over do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno in _OF_HOST:
                raise ConfigError(
                    f"{host_option}: expected an address of this machine, got {shown(host)}: {error.strerror}"
                ) from error
            raise ConfigError(
                f"{port_option}: expected a port of {host} that is free, got {port}, on which something "
                f"listens or we may not ({error.strerror}); choose another one"
            ) from error
    return str(address[0])
