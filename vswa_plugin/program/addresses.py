"""Addresses to listen on, which are checked before a program has started anything else, and their URLs."""

from __future__ import annotations

import errno
import socket

from vswa_plugin.errors import ConfigError, shown

#: Hosts that stand for all addresses of the machine, and those at which the machine itself reaches them.
_LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1"}
#: The system's reasons that are about the host rather than the port.
_OF_HOST = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def http_url(host: str, port: int) -> str:
    """The URL of a server at ``host``; an IPv6 address is put into brackets, as RFC 3986 wants it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def local_url(host: str, port: int) -> str:
    """The URL at which this machine reaches a server that listens on ``host``."""
    return http_url(_LOCAL.get(host, host), port)


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
