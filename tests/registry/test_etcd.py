"""What is particular to the registry in etcd: settings, fail-over, leases, TLS, users."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests import wire_1_0
from tests.conftest import Brokers, Run
from tests.registry_helpers import ENTRY, EtcdBackend, Reader, entry, joined_and_watched, start_etcd
from vswa_plugin.errors import ConfigError, ConnectError, ProtocolError
from vswa_plugin.launch.processes import free_port
from vswa_plugin.registry import Entry, decode_entry, encode_entry, last_epoch
from vswa_plugin.registry._etcd3_client import Connection, _Client
from vswa_plugin.registry.etcd import EtcdRegistry
from vswa_plugin.registry.etcd_settings import Endpoint, EtcdSecurity, parse_endpoints
from vswa_plugin.wire.events import Rank

SECRET = "pa55word-not-to-be-shown"
USER = {"ETCD_AUTH_USERNAME": "root", "ETCD_AUTH_PASSWORD": SECRET}

# ---- entries --------------------------------------------------------------------------------------


def test_an_entry_survives_the_registry_and_newer_fields_are_ignored() -> None:
    assert decode_entry(ENTRY.key, encode_entry(ENTRY)) == ENTRY
    newer = msgspec.json.encode({**msgspec.to_builtins(ENTRY), "new_field": 1})
    assert decode_entry(ENTRY.key, newer) == ENTRY


#: As workers of releases before status_url, version and engine_version wrote it.
OLD_ENTRY = b"""{"namespace":"ns","component":"backend","worker_id":2748,"mode":"agg","engine":"gemma3_cpu",\
"served_model_name":"gemma","model_path":"/models/gemma","context_length":8192,"block_size":32,\
"rule":"trtllm_v2","hash_scheme":"dynamo-xxh3-1337","groups":[[0,512,32],[1,null,32]],"epochs":{"0":7},\
"total_kv_blocks":100,"endpoint":"generate","host":"h","pid":5,"tool_call_parser":"hermes",\
"reasoning_parser":"qwen3","taints":["a"],"visible":false}"""


def test_an_entry_of_an_older_release_is_read_and_says_nothing_of_what_that_did_not_know() -> None:
    entry = decode_entry(ENTRY.key, OLD_ENTRY)

    assert (entry.pid, entry.epochs, entry.taints, entry.visible) == (5, {0: 7}, ("a",), False)
    assert (entry.status_url, entry.version, entry.engine_version) == (None, "", "")


def test_an_older_reader_ignores_what_an_entry_of_today_says_besides() -> None:
    today = msgspec.structs.replace(
        decode_entry(ENTRY.key, OLD_ENTRY), status_url="http://h:9090", version="9.9", engine_version="1.3"
    )
    read = msgspec.json.decode(encode_entry(today), type=wire_1_0.Entry)

    assert msgspec.json.encode(read) == OLD_ENTRY


def test_a_malformed_entry_is_named_by_key_and_field() -> None:
    with pytest.raises(ProtocolError, match=r"expected a worker entry at some/key, .*namespace"):
        decode_entry("some/key", b"{}")


def test_an_entry_under_the_key_of_another_is_malformed() -> None:
    with pytest.raises(ProtocolError, match=f"expected a worker entry at some/key, got that of {ENTRY.key}"):
        decode_entry("some/key", encode_entry(ENTRY))


def test_the_refusal_of_an_entry_with_a_long_name_is_short() -> None:
    long = msgspec.structs.replace(ENTRY, namespace="x" * 5_000)
    with pytest.raises(ProtocolError) as refusal:
        decode_entry("some/key", encode_entry(long))

    assert len(str(refusal.value)) < 1_200


def test_the_last_epoch_of_a_rank_is_the_highest_that_any_entry_knows() -> None:
    entries = [entry(1, 5), entry(1, 7, "other"), entry(2, 9), msgspec.structs.replace(ENTRY, worker_id=3)]

    assert last_epoch(entries, Rank(1, 0)) == 7
    assert last_epoch(entries, Rank(3, 1)) == 5
    assert last_epoch(entries, Rank(1, 1)) == 0
    assert last_epoch(entries, Rank(4, 0)) == 0


# ---- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("http://a:1,b:2", [Endpoint("a", 1, False), Endpoint("b", 2, None)]),
        (" a , https://b:3/", [Endpoint("a", 2379, None), Endpoint("b", 3, True)]),
        ("http://[::1]:4", [Endpoint("[::1]", 4, False)]),
    ],
)
def test_endpoints_are_a_list_of_urls(text: str, parsed: list[Endpoint]) -> None:
    assert parse_endpoints(text) == parsed


@pytest.mark.parametrize("text", ["", " , ", "ftp://a:1", "http://a:port", "http://:1", "http://a:1/x"])
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="ETCD_ENDPOINTS: expected"):
        parse_endpoints(text)


@pytest.mark.parametrize("text", [f"http://root:{SECRET}@a:1", f"root:{SECRET}@a", f"http://u:{SECRET}@a:x"])
def test_a_password_in_an_endpoint_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_endpoints(text)

    assert SECRET not in str(refused.value)
    assert "***@a" in str(refused.value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ETCD_AUTH_USERNAME": "u"}, "ETCD_AUTH_PASSWORD: expected a value because ETCD_AUTH_USERNAME is"),
        ({"ETCD_AUTH_PASSWORD": SECRET}, "ETCD_AUTH_USERNAME: expected a value because ETCD_AUTH_PASSWORD"),
        ({"ETCD_AUTH_CLIENT_CERT": "x"}, "ETCD_AUTH_CLIENT_KEY: expected a value because"),
        ({"ETCD_AUTH_CLIENT_KEY": "x"}, "ETCD_AUTH_CLIENT_CERT: expected a value because"),
        (
            {"ETCD_AUTH_CA": "/no/such"},
            "ETCD_AUTH_CA: expected a PEM file or PEM text, got '/no/such': No such",
        ),
        ({"ETCD_AUTH_CA": __file__ + "c"}, "ETCD_AUTH_CA: expected a PEM file"),
        ({"ETCD_AUTH_CA": sys.executable}, "ETCD_AUTH_CA: expected a PEM file, got .* other bytes in"),
    ],
)
def test_what_is_wrong_with_credentials_is_said_by_variable(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        EtcdSecurity.from_env(environ)

    assert SECRET not in str(refused.value)


def test_no_representation_shows_a_secret() -> None:
    pem = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----"
    certificates = {"ETCD_AUTH_CLIENT_CERT": pem, "ETCD_AUTH_CLIENT_KEY": pem}
    security = EtcdSecurity.from_env({**USER, **certificates})
    with pytest.raises(ConfigError) as refused:
        EtcdSecurity.from_env({**certificates, "ETCD_AUTH_CLIENT_KEY": '"' + pem})

    assert security.client_key == pem.encode()
    assert SECRET not in repr(security)
    assert "c2VjcmV0" not in repr(security) + str(refused.value)


def test_certificates_are_never_silently_not_used() -> None:
    security = EtcdSecurity(ca=b"-----BEGIN")

    assert [security.uses_tls(Endpoint("a", 1, tls)) for tls in (None, True)] == [True, True]
    with pytest.raises(ConfigError, match="ETCD_ENDPOINTS: expected https://a:1 because ETCD_AUTH_CA"):
        EtcdRegistry("b,http://a:1", security=security)


# ---- connections ----------------------------------------------------------------------------------


def test_the_second_endpoint_is_used_when_the_first_does_not_answer(run: Run[Any], brokers: Brokers) -> None:
    async def body() -> list[Entry]:
        registry = EtcdRegistry(f"http://127.0.0.1:{free_port()},{brokers.etcd_endpoints}")
        await registry.join(entry(1, namespace="failover"))
        found = await registry.entries("failover")
        await registry.leave()
        return found

    assert run(body()) == [entry(1, namespace="failover")]


def test_an_etcd_that_is_not_there_is_named_with_the_setting(run: Run[Any]) -> None:
    port = free_port()

    with pytest.raises(
        ConnectError,
        match=rf"expected etcd at 127.0.0.1:{port} .ETCD_ENDPOINTS., got UNAVAILABLE: .* is it running",
    ):
        run(EtcdRegistry(f"http://127.0.0.1:{port}").entries())


def test_an_update_after_the_lease_ran_out_takes_a_new_one(run: Run[Any], brokers: Brokers) -> None:
    async def body() -> list[Entry]:
        registry = EtcdRegistry(brokers.etcd_endpoints)
        await registry.join(entry(1, namespace="leases"))
        lease_id = registry._lease_id
        await registry._connection.call(lambda client: client.revoke_lease(lease_id))
        assert await registry.entries("leases") == []
        await registry.update(epochs={0: 2})
        found = await registry.entries("leases")
        await registry.leave()
        return found

    assert run(body()) == [entry(1, 2, "leases")]


def test_etcd3_imports_beside_a_modern_protobuf_without_any_process_wide_switch() -> None:
    code = (
        "import google.protobuf, os; "
        "assert int(google.protobuf.__version__.split('.')[0]) >= 4; "
        "import vswa_plugin.registry.etcd; import etcd3; "
        "assert 'PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION' not in os.environ; "
        "print(etcd3.etcdrpc.PutRequest(key=b'k').key)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:google", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout.strip()) == (0, "b'k'"), done.stderr


# ---- users ----------------------------------------------------------------------------------------


def enable_users(client: Any) -> None:
    """User root, who may do everything, and nobody else."""
    import etcd3.etcdrpc as rpc

    stub = rpc.AuthStub(client.channel)
    stub.UserAdd(rpc.AuthUserAddRequest(name="root", password=SECRET))
    stub.RoleAdd(rpc.AuthRoleAddRequest(name="root"))
    stub.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"))
    stub.AuthEnable(rpc.AuthEnableRequest())


@pytest.fixture(scope="module")
def guarded(run: Run[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdBackend]:
    """An etcd with users and without TLS."""
    made = EtcdBackend(tmp_path_factory.mktemp("guarded"))
    run(made.come_back())
    run(made.call(enable_users))
    yield made
    run(made.stop())


def test_with_a_user_everything_works_and_a_restart_that_voids_the_token_is_survived(
    run: Run[Any], guarded: EtcdBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def body() -> None:
        security = EtcdSecurity.from_env(USER)
        worker, router = (EtcdRegistry(guarded.where, 1, security) for _ in range(2))
        async with joined_and_watched(worker, router) as reader:
            await worker.update(epochs={0: 2})
            await reader.until_holds(entry(1, 2))
            await guarded.go_away()
            await reader.until(lambda reader: not reader.connected)
            await guarded.come_back()
            await worker.update(epochs={0: 3})
            await reader.until_holds(entry(1, 3))

    run(body())
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "environ",
    [{}, {**USER, "ETCD_AUTH_PASSWORD": SECRET + "x"}, {**USER, "ETCD_AUTH_USERNAME": "nobody"}],
    ids=["none", "wrong password", "unknown user"],
)
def test_refused_credentials_are_the_users_to_correct(
    run: Run[Any], guarded: EtcdBackend, environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def body() -> str:
        registry = EtcdRegistry(guarded.where, security=EtcdSecurity.from_env(environ))
        with pytest.raises(ConfigError, match="to accept ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD") as no:
            await registry.entries()
        await registry.close()
        return str(no.value)

    assert SECRET not in run(body()) + caplog.text


def test_a_user_for_an_etcd_without_users_is_refused(run: Run[Any], brokers: Brokers) -> None:
    async def body() -> None:
        registry = EtcdRegistry(brokers.etcd_endpoints, security=EtcdSecurity.from_env(USER))
        with pytest.raises(ConfigError, match="authentication is not enabled"):
            await registry.entries()
        await registry.close()

    run(body())


# ---- TLS ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tls:
    """An etcd that speaks TLS only and wants a client certificate, and what it takes to reach it."""

    url: str
    environ: dict[str, str]
    other_ca: str


def make_certificates(folder: Path) -> None:
    """A CA, a server certificate for 127.0.0.1, a client certificate, and a foreign CA."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its certificates with openssl, which is not installed")

    def call(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for name in ("ca", "other"):
        call(
            *new,
            "-x509",
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
        )
    (folder / "server.ext").write_text(
        "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n"
    )
    (folder / "client.ext").write_text("extendedKeyUsage=clientAuth\n")
    for name in ("server", "client"):
        call(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        sign = ("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        call(*sign, "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.pem")


@pytest.fixture(scope="module")
def tls(run: Run[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    url = f"https://127.0.0.1:{free_port()}"
    options = ["--client-cert-auth", "--trusted-ca-file", str(folder / "ca.pem")]
    options += ["--cert-file", str(folder / "server.pem"), "--key-file", str(folder / "server.key")]
    server = run(start_etcd(folder, folder / "data", url, *options))
    environ = {
        "ETCD_AUTH_CA": str(folder / "ca.pem"),
        "ETCD_AUTH_CLIENT_CERT": str(folder / "client.pem"),
        "ETCD_AUTH_CLIENT_KEY": str(folder / "client.key"),
    }
    yield Tls(url, environ, str(folder / "other.pem"))
    run(server.stop())


def test_with_certificates_from_files_or_as_text_everything_works_over_tls(run: Run[Any], tls: Tls) -> None:
    as_text = {name: Path(path).read_text("ascii") for name, path in tls.environ.items()}

    async def body() -> None:
        # No scheme: certificates say that TLS is meant.
        worker = EtcdRegistry(tls.url, security=EtcdSecurity.from_env(tls.environ))
        router = EtcdRegistry(tls.url.removeprefix("https://"), security=EtcdSecurity.from_env(as_text))
        async with joined_and_watched(worker, router) as reader:
            await worker.update(epochs={0: 2})
            await reader.until_holds(entry(1, 2))
            await worker.leave()
            await reader.until_holds()

    run(body())


@pytest.mark.parametrize("lack", ["CA", "client certificate", "TLS"])
def test_a_connection_that_tls_refuses_is_no_answer(run: Run[Any], tls: Tls, lack: str) -> None:
    url, environ, message = tls.url, dict(tls.environ), "ETCD_ENDPOINTS"
    if lack == "CA":
        environ["ETCD_AUTH_CA"] = tls.other_ca
        message = "do http or https and ETCD_AUTH_CA fit the server"
    elif lack == "client certificate":
        environ = {"ETCD_AUTH_CA": environ["ETCD_AUTH_CA"]}
    else:
        url, environ = url.replace("https", "http"), {}

    async def body() -> None:
        registry = EtcdRegistry(url, security=EtcdSecurity.from_env(environ))
        with pytest.raises(ConnectError, match=message):
            await registry.entries()
        await registry.close()

    run(body())


def test_user_and_certificates_go_together(run: Run[Any], tls: Tls, caplog: pytest.LogCaptureFixture) -> None:
    """Last in this file: the server keeps its user."""
    caplog.set_level(logging.DEBUG)

    async def body() -> None:
        opened = Connection(parse_endpoints(tls.url), EtcdSecurity.from_env(tls.environ))
        await opened.call(enable_users)
        await opened.close()
        registry = EtcdRegistry(tls.url, security=EtcdSecurity.from_env({**tls.environ, **USER}))
        await registry.join(entry(1))
        async with registry.watch() as watcher:
            reader = Reader(watcher)
            await reader.until_holds(entry(1))
            await registry.update(epochs={0: 2})
            await reader.until_holds(entry(1, 2))
        await registry.close()

    run(body())
    assert SECRET not in caplog.text


def test_a_client_that_cannot_be_made_leaves_no_channel_behind(
    run: Run[Any], guarded: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(_Client, "close", lambda client: closed.append(client.channel.close()))
    security = EtcdSecurity.from_env({**USER, "ETCD_AUTH_PASSWORD": "no"})

    with pytest.raises(Exception, match="authentication failed"):
        _Client(parse_endpoints(guarded.where)[0], security)
    assert len(closed) == 1
