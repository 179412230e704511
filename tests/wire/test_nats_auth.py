"""Logging in to a real nats-server in each way, from Dynamo's environment variables."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import nkeys
import pytest

from tests.conftest import Run
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.launch.brokers import _listens, nats_server_binary
from vswa_plugin.launch.processes import Child, free_port
from vswa_plugin.wire.login import connect_options
from vswa_plugin.wire.transport import Transport

NKEY_SEED = bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)).decode()
NKEY_PUBLIC = bytes(nkeys.from_seed(NKEY_SEED.encode()).public_key).decode()


async def reaches(
    tmp_path: Path, config: str, environ: dict[str, str], scheme: str = "nats", patience_s: float = 20
) -> None:
    """Start a server with ``config`` and make one round trip; raises ConnectError where it lets nobody in."""
    port = free_port()
    file = tmp_path / "nats.conf"
    file.write_text(f"listen: 127.0.0.1:{port}\n{config}\n")
    command = [nats_server_binary(), "-c", str(file)]
    server = await Child.start("nats-auth", command, tmp_path)
    try:
        await server.until(lambda: _listens(port), "listening", 10)
        transport = Transport(f"{scheme}://localhost:{port}", environ=environ)
        await transport.connect(timeout=patience_s)
        await transport.flush()
        await transport.close()
    finally:
        await server.stop()


USER = "authorization { user: vswa, password: secret }"
TOKEN = "authorization { token: secret }"
NKEY = f"authorization {{ users: [ {{ nkey: {NKEY_PUBLIC} }} ] }}"


@pytest.mark.parametrize(
    ("config", "environ"),
    [
        pytest.param("", {}, id="open"),
        pytest.param(USER, {"NATS_AUTH_USERNAME": "vswa", "NATS_AUTH_PASSWORD": "secret"}, id="user"),
        pytest.param(TOKEN, {"NATS_AUTH_TOKEN": "secret"}, id="token"),
        pytest.param(NKEY, {"NATS_AUTH_NKEY": NKEY_SEED}, id="nkey"),
    ],
)
def test_the_right_login_is_let_in(
    run: Run[Any], tmp_path: Path, config: str, environ: dict[str, str]
) -> None:
    run(reaches(tmp_path, config, environ))


@pytest.mark.parametrize(
    ("config", "environ"),
    [
        pytest.param(USER, {}, id="no login"),
        pytest.param(
            USER, {"NATS_AUTH_USERNAME": "vswa", "NATS_AUTH_PASSWORD": "wrong"}, id="wrong password"
        ),
        pytest.param(TOKEN, {"NATS_AUTH_TOKEN": "wrong"}, id="wrong token"),
    ],
)
def test_a_wrong_login_is_an_error_that_shows_no_secret(
    run: Run[Any], tmp_path: Path, config: str, environ: dict[str, str]
) -> None:
    with pytest.raises(ConnectError, match=r"(?i)authorization") as refused:
        run(reaches(tmp_path, config, environ, patience_s=1))
    assert "wrong" not in str(refused.value)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates for a server and a client, made with openssl."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    try:
        new_key = ("-newkey", "rsa:2048", "-nodes")
        openssl(
            "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2"
        )
        (folder / "san.cnf").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        for name in ("server", "client"):
            subject = ("-subj", f"/CN={name}")
            openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", *subject)
            signed_by = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
            openssl(
                "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed_by, "-extfile", "san.cnf"
            )
    except FileNotFoundError:
        pytest.skip("openssl is not installed; apt-get install openssl")
    return folder


def test_tls_with_certificates_of_both_sides(run: Run[Any], tmp_path: Path, certificates: Path) -> None:
    config = (
        f'tls {{ cert_file: "{certificates}/server.pem", key_file: "{certificates}/server.key", '
        f'ca_file: "{certificates}/ca.pem", verify: true }}'
    )
    environ = {
        "NATS_TLS_CA_CERT_PATH": str(certificates / "ca.pem"),
        "NATS_TLS_CLIENT_CERT_PATH": str(certificates / "client.pem"),
        "NATS_TLS_CLIENT_KEY_PATH": str(certificates / "client.key"),
    }
    run(reaches(tmp_path, config, environ, "tls"))

    with pytest.raises(ConnectError):
        run(
            reaches(
                tmp_path,
                config,
                {"NATS_TLS_CA_CERT_PATH": environ["NATS_TLS_CA_CERT_PATH"]},
                "tls",
                patience_s=3,
            )
        )


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NATS_AUTH_USERNAME": "a"}, "NATS_AUTH_USERNAME: expected NATS_AUTH_PASSWORD beside it"),
        (
            {"NATS_AUTH_TOKEN": "hidden", "NATS_AUTH_NKEY": "hidden"},
            "expected one way to log in, got NATS_AUTH_TOKEN, NATS_AUTH_NKEY",
        ),
        (
            {"NATS_AUTH_CREDENTIALS_FILE": "/nowhere"},
            "NATS_AUTH_CREDENTIALS_FILE: expected a file at /nowhere",
        ),
        ({"NATS_TLS_CA_CERT_PATH": "/nowhere"}, "NATS_TLS_CA_CERT_PATH: expected a file at /nowhere"),
    ],
)
def test_an_incomplete_login_is_refused_before_any_connection(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        connect_options(environ)
    assert message in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.pem").write_text("x")
    with pytest.raises(ConfigError, match="NATS_TLS_CLIENT_CERT_PATH and NATS_TLS_CLIENT_KEY_PATH together"):
        connect_options({"NATS_TLS_CLIENT_CERT_PATH": str(tmp_path / "c.pem")})
