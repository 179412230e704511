"""How to log in to NATS, from the environment variables that Dynamo reads too. Pure but for files and TLS.

NATS_AUTH_USERNAME, NATS_AUTH_PASSWORD          user and password
NATS_AUTH_TOKEN                                 a token
NATS_AUTH_NKEY                                  the seed of an NKEY
NATS_AUTH_CREDENTIALS_FILE                      a .creds file
NATS_TLS_CA_CERT_PATH                           trust this authority instead of the system's
NATS_TLS_CLIENT_CERT_PATH, NATS_TLS_CLIENT_KEY_PATH   our certificate and its key
NATS_TLS_INSECURE=1                             do not check the server's certificate: tests only
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vswa_plugin.errors import ConfigError


def connect_options(environ: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments for ``nats.connect``; empty where nothing is set.

    :raises ConfigError: names the variable that is incomplete, doubled or points nowhere. Never a secret.
    """
    return {**_login(environ), **_tls(environ)}


def _login(environ: Mapping[str, str]) -> dict[str, Any]:
    ways = {
        name: environ[name]
        for name in (
            "NATS_AUTH_USERNAME",
            "NATS_AUTH_TOKEN",
            "NATS_AUTH_NKEY",
            "NATS_AUTH_CREDENTIALS_FILE",
        )
        if environ.get(name)
    }
    if len(ways) > 1:
        raise ConfigError(f"NATS: expected one way to log in, got {', '.join(ways)}; unset all but one")
    if "NATS_AUTH_TOKEN" in ways:
        return {"token": ways["NATS_AUTH_TOKEN"]}
    if "NATS_AUTH_NKEY" in ways:
        return {"nkeys_seed_str": ways["NATS_AUTH_NKEY"]}
    if "NATS_AUTH_CREDENTIALS_FILE" in ways:
        return {"user_credentials": _file(environ, "NATS_AUTH_CREDENTIALS_FILE")}
    if "NATS_AUTH_USERNAME" in ways:
        if "NATS_AUTH_PASSWORD" not in environ:
            raise ConfigError("NATS_AUTH_USERNAME: expected NATS_AUTH_PASSWORD beside it, which is not set")
        return {"user": ways["NATS_AUTH_USERNAME"], "password": environ["NATS_AUTH_PASSWORD"]}
    return {}


def _tls(environ: Mapping[str, str]) -> dict[str, Any]:
    authority = _file(environ, "NATS_TLS_CA_CERT_PATH")
    certificate = _file(environ, "NATS_TLS_CLIENT_CERT_PATH")
    key = _file(environ, "NATS_TLS_CLIENT_KEY_PATH")
    insecure = environ.get("NATS_TLS_INSECURE", "").lower() in ("1", "true")
    if not (authority or certificate or insecure):
        return {}
    if bool(certificate) != bool(key):
        raise ConfigError(
            "NATS TLS: expected NATS_TLS_CLIENT_CERT_PATH and NATS_TLS_CLIENT_KEY_PATH together, got one"
        )
    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate:
            context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"NATS TLS: the certificates cannot be used: {error}") from error
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return {"tls": context}


def _file(environ: Mapping[str, str], name: str) -> str | None:
    path = environ.get(name)
    if path and not Path(path).is_file():
        raise ConfigError(f"{name}: expected a file at {path}, got nothing there")
    return path or None
