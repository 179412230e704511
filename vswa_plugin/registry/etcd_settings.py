"""Which etcd, and how to reach it: endpoints, certificates, user. Pure but for reading certificates.

The variables are Dynamo's, so that one environment serves both:

    ETCD_ENDPOINTS                                   http(s)://host:port, several with commas
    ETCD_AUTH_USERNAME, ETCD_AUTH_PASSWORD           both or none
    ETCD_AUTH_CA                                     CA of the server's certificate (default: the system's)
    ETCD_AUTH_CLIENT_CERT, ETCD_AUTH_CLIENT_KEY      both or none: our own certificate

A certificate or key is given as the path of a PEM file or as PEM text. Dynamo documents paths and its
runtime has been seen to take the text; here both work. Dynamo uses either user or certificates, we both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from vswa_plugin.errors import ConfigError

DEFAULT_PORT = 2379
USERNAME, PASSWORD = "ETCD_AUTH_USERNAME", "ETCD_AUTH_PASSWORD"
CA, CLIENT_CERT, CLIENT_KEY = "ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY"


class Endpoint(NamedTuple):
    """One etcd server. ``tls`` None: not given, so TLS where certificates are configured."""

    host: str
    port: int = DEFAULT_PORT
    tls: bool | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_endpoints(endpoints: str) -> list[Endpoint]:
    """``http://a:2379,b`` -> [a:2379 without TLS, b:2379]; raises ConfigError on what is neither."""
    parsed = [_parse(part.strip()) for part in endpoints.split(",") if part.strip()]
    if not parsed:
        raise ConfigError("ETCD_ENDPOINTS: expected at least one http://host:port, got none")
    return parsed


def _parse(text: str) -> Endpoint:
    try:
        parts = urlsplit(text if "://" in text else f"//{text}")
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError as error:
        raise ConfigError(f"ETCD_ENDPOINTS: expected http://host:port, got {_shown(text)!r}") from error
    if "@" in text:
        raise ConfigError(
            f"ETCD_ENDPOINTS: expected http://host:port, got a user in {_shown(text)!r}; "
            f"set {USERNAME} and {PASSWORD} instead"
        )
    if not host or parts.scheme not in ("", "http", "https") or parts.path not in ("", "/"):
        raise ConfigError(f"ETCD_ENDPOINTS: expected http://host:port, got {text!r}")
    tls = None if not parts.scheme else parts.scheme == "https"
    return Endpoint(f"[{host}]" if ":" in host else host, port, tls)


def _shown(text: str) -> str:
    """``text`` without what may be a password."""
    scheme, separator, rest = text.rpartition("://")
    return f"{scheme}{separator}***@{rest.rpartition('@')[2]}" if "@" in rest else text


@dataclass(frozen=True)
class EtcdSecurity:
    """Credentials, checked. Secrets are not shown by ``repr``. PEM as bytes."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: bytes | None = field(default=None, repr=False)
    client_cert: bytes | None = field(default=None, repr=False)
    client_key: bytes | None = field(default=None, repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> EtcdSecurity:
        """What ``environ`` says; raises ConfigError that names the variable."""
        for one, other in ((USERNAME, PASSWORD), (CLIENT_CERT, CLIENT_KEY)):
            if bool(environ.get(one)) != bool(environ.get(other)):
                have, lack = (one, other) if environ.get(one) else (other, one)
                raise ConfigError(f"{lack}: expected a value because {have} is set, got none")
        return cls(
            environ.get(USERNAME) or None,
            environ.get(PASSWORD) or None,
            _pem(environ, CA),
            _pem(environ, CLIENT_CERT),
            _pem(environ, CLIENT_KEY),
        )

    @property
    def has_certificates(self) -> bool:
        return self.ca is not None or self.client_cert is not None

    def uses_tls(self, endpoint: Endpoint) -> bool:
        """Whether to speak TLS; raises ConfigError where certificates would silently not be used."""
        if endpoint.tls is False and self.has_certificates:
            raise ConfigError(
                f"ETCD_ENDPOINTS: expected https://{endpoint} because {CA} or {CLIENT_CERT} is set, "
                f"got http://{endpoint}"
            )
        return self.has_certificates if endpoint.tls is None else endpoint.tls


def _pem(environ: Mapping[str, str], name: str) -> bytes | None:
    value = environ.get(name)
    if not value:
        return None
    if value.lstrip().startswith("-----BEGIN"):
        return value.encode()
    try:
        content = Path(value).read_bytes()
    except (OSError, ValueError) as error:
        # What looks like a broken PEM text may be a private key.
        shown = f"{len(value)} characters" if "-----" in value or "\n" in value else repr(value)
        reason = getattr(error, "strerror", None) or "not a path"
        raise ConfigError(f"{name}: expected a PEM file or PEM text, got {shown}: {reason}") from None
    if b"-----BEGIN" not in content:
        raise ConfigError(f"{name}: expected a PEM file, got {len(content)} other bytes in {value}")
    return content
