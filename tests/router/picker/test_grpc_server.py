"""The picker's gRPC server against grpcio's own client, and against peers that break the rules of HTTP/2."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hpack import Encoder

from tests.e2e_helpers import eventually
from vswa_plugin.router.picker.args import parse_picker
from vswa_plugin.router.picker.grpc_server import GrpcServer, Reply

PATH = "/pkg.Service/Method"
LIMIT = 16 << 20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Echo:
    """Sends each message back; keeps what came."""

    def __init__(self, reply: Reply, seen: list[Any]) -> None:
        self.reply, self.seen = reply, seen
        seen.append(self)
        self.messages: list[bytes] = []
        self.ended = 0

    def received(self, message: bytes) -> None:
        self.messages.append(message)
        if message == b"finish":
            self.reply.finish(14, "not now")
        elif message == b"late":
            asyncio.get_running_loop().call_later(0.01, self.reply.send, b"later")
        else:
            self.reply.send(message)

    def closed(self) -> None:
        self.ended += 1


def served(body: Callable[[int, list[Echo], GrpcServer], Awaitable[Any]]) -> Any:
    """What ``body`` returns, given the port, the streams that were opened, and the server."""

    async def run() -> Any:
        streams: list[Echo] = []
        server = GrpcServer(PATH, lambda reply: Echo(reply, streams), LIMIT)
        port = await server.start("127.0.0.1", 0)
        try:
            return await body(port, streams, server)
        finally:
            await server.stop()
            assert all(1 == stream.ended for stream in streams), "each stream ends once"

    return asyncio.run(asyncio.wait_for(run(), 20))


def channel(port: int) -> Any:
    most = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=most)


def call(opened: Any, path: str = PATH) -> Any:
    return opened.stream_stream(path)()


async def exchanged(port: int, streams: list[Echo], messages: list[bytes]) -> list[bytes]:
    async with channel(port) as opened:
        stream = call(opened)
        answers = []
        for message in messages:
            await stream.write(message)
            answers.append(await stream.read())
        await stream.done_writing()
        assert grpc.StatusCode.OK == await stream.code()
    return answers


async def end_of(stream: Any, *messages: bytes) -> tuple[Any, str]:
    """Code and reason with which a stream ends, before any answer."""
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        for each in messages:
            await stream.write(each)
        await stream.read()
    return ended.value.code(), ended.value.details()


@pytest.mark.parametrize("size", [0, 1, 16_384, 5 << 20], ids=str)
def test_messages_come_back_whole_also_those_above_every_window_of_flow_control(size: int) -> None:
    messages = [b"x" * size, b"short", b"y" * size]

    assert messages == served(lambda port, streams, _: exchanged(port, streams, messages))


def test_streams_are_independent_and_an_answer_may_come_later() -> None:
    async def body(port: int, streams: list[Echo], _: GrpcServer) -> list[bytes]:
        async with channel(port) as opened:
            slow, fast = call(opened), call(opened)
            await slow.write(b"late")
            await fast.write(b"fast")
            answers = [await fast.read(), await slow.read()]
            for stream in (slow, fast):
                await stream.done_writing()
                assert grpc.StatusCode.OK == await stream.code()
            return answers

    assert [b"fast", b"later"] == served(body)


def test_a_stream_that_is_finished_here_has_its_code_and_its_reason() -> None:
    async def body(port: int, streams: list[Echo], _: GrpcServer) -> tuple[Any, str]:
        async with channel(port) as opened:
            stream = call(opened)
            await stream.write(b"finish")
            ended = await end_of(stream)
            streams[0].reply.send(b"too late")
            return ended

    assert (grpc.StatusCode.UNAVAILABLE, "not now") == served(body)


def test_another_method_is_refused_and_a_message_above_the_limit_ends_its_stream() -> None:
    async def code(opened: Any, path: str, *messages: bytes) -> Any:
        return (await end_of(call(opened, path), *messages))[0]

    async def body(port: int, streams: list[Echo], _: GrpcServer) -> list[Any]:
        async with channel(port) as opened:
            return [
                await code(opened, "/grpc.health.v1.Health/Check"),
                await code(opened, PATH, b"x" * (LIMIT + 1)),
            ]

    assert [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED] == served(body)


def test_a_client_that_cancels_or_vanishes_closes_its_streams() -> None:
    async def body(port: int, streams: list[Echo], _: GrpcServer) -> int:
        async with channel(port) as opened:
            cancelled = call(opened)
            await cancelled.write(b"a")
            await cancelled.read()
            cancelled.cancel()
            await eventually(lambda: streams[0].ended, "the cancelled stream is closed")
            left = call(opened)
            await left.write(b"b")
            await left.read()
        await eventually(lambda: streams[1].ended, "the stream of the closed channel is closed")
        return len(streams)

    assert 2 == served(body)


def test_a_server_that_leaves_follows_its_streams_and_takes_no_new_ones() -> None:
    async def body(port: int, streams: list[Echo], server: GrpcServer) -> tuple[bytes, Any]:
        async with channel(port) as opened:
            stream = call(opened)
            await stream.write(b"a")
            await stream.read()
            server.leave()
            await stream.write(b"b")
            answer = await stream.read()
            code, _ = await end_of(call(opened))
            await stream.done_writing()
            assert grpc.StatusCode.OK == await stream.code()
            return answer, code

    assert (b"b", grpc.StatusCode.UNAVAILABLE) == served(body)


def test_with_a_certificate_it_speaks_tls() -> None:
    files = Path(__file__).parents[2] / "data/tls"
    given = ("--tls-cert", str(files / "cert.pem"), "--tls-key", str(files / "key.pem"))
    tls = parse_picker(given, environ={})[1].context()

    async def body() -> bytes:
        streams: list[Echo] = []
        server = GrpcServer(PATH, lambda reply: Echo(reply, streams), LIMIT)
        port = await server.start("127.0.0.1", 0, tls)
        trusted = grpc.ssl_channel_credentials((files / "cert.pem").read_bytes())
        name = [("grpc.ssl_target_name_override", "picker")]
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", trusted, options=name) as opened:
            stream = call(opened)
            await stream.write(b"secret")
            answer: bytes = await stream.read()
        await server.stop()
        return answer

    assert b"secret" == asyncio.run(asyncio.wait_for(body(), 20))


# -- frames made by hand ---------------------------------------------------------------------------


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def message(body: bytes) -> bytes:
    return b"\0" + len(body).to_bytes(4, "big") + body


def headers(encoder: Encoder, path: str = PATH) -> bytes:
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "a"),
        ("te", "trailers"),
    ]
    return bytes(encoder.encode(fields))


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, int, int, bytes]]:
    while len(head := await reader.read(9)) == 9:
        payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
        yield head[3], head[4], int.from_bytes(head[5:], "big"), payload


async def answers(port: int, *sent: bytes) -> list[tuple[int, int, bytes]]:
    """(kind, stream, payload) of what comes until the server closes or has answered stream 5 or pings."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for each in sent:
        writer.write(each)
        await writer.drain()
        await asyncio.sleep(0)
    found = []
    async for kind, flags, stream_id, payload in frames(reader):
        found.append((kind, stream_id, payload))
        if (kind == 6 and flags & 1) or kind == 7:
            break
    writer.close()
    return found


def data(found: list[tuple[int, int, bytes]]) -> dict[int, bytes]:
    return {stream_id: payload for kind, stream_id, payload in found if kind == 0}


def test_headers_that_were_sent_before_our_settings_were_known_may_use_the_peers_table() -> None:
    """As Envoy does: its first streams come with our settings still under way."""
    encoder = Encoder()
    first, second = headers(encoder), headers(encoder)
    assert len(second) < len(first), "the second one refers to the first"
    later = Encoder()
    later.header_table_size = 0

    async def body(port: int, streams: list[Echo], _: GrpcServer) -> dict[int, bytes]:
        return data(
            await answers(
                port,
                PREFACE + frame(4, 0, 0),
                frame(1, 4, 1, first) + frame(0, 0, 1, message(b"a")),
                frame(1, 4, 3, second) + frame(0, 0, 3, message(b"b")),
                frame(4, 1, 0),
                frame(1, 4, 5, headers(later)) + frame(0, 0, 5, message(b"c")),
                frame(6, 0, 0, b"8 bytes."),
            )
        )

    assert {1: message(b"a"), 3: message(b"b"), 5: message(b"c")} == served(body)


def test_headers_in_parts_padding_priorities_and_messages_cut_anywhere_are_read() -> None:
    block = headers(Encoder())
    opened = frame(1, 0x08 | 0x20, 1, bytes((3,)) + b"\0\0\0\0\x10" + block[:4] + b"\0\0\0")
    rest = frame(9, 0, 1, block[4:9]) + frame(9, 4, 1, block[9:])
    whole = message(b"hello") + message(b"world")
    parts = frame(0, 8, 1, b"\2" + whole[:7] + b"\0\0") + frame(0, 0, 1, whole[7:])
    stream = PREFACE + frame(4, 0, 0) + opened + rest + frame(2, 0, 1, b"\0" * 5) + parts
    ping = frame(6, 0, 0, b"8 bytes.")

    async def body(port: int, streams: list[Echo], _: GrpcServer) -> list[bytes]:
        await answers(port, *[bytes((each,)) for each in stream], ping)
        return streams[0].messages

    assert [b"hello", b"world"] == served(body)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        PREFACE + frame(1, 4, 2, b""),
        PREFACE + frame(9, 4, 1, b""),
        PREFACE + frame(1, 0, 1, b"") + frame(0, 0, 1, b""),
        PREFACE + frame(1, 4, 1, b"\xff\xff\xff\xff"),
        PREFACE + frame(4, 0, 0, b"abc"),
        PREFACE + frame(8, 0, 0, b"abc"),
        PREFACE + frame(1, 4 | 8, 1, b"\xff"),
        PREFACE + b"\xff\xff\xff\0\0\0\0\0\0",
    ],
)
def test_a_peer_that_speaks_something_else_is_left_and_others_go_on(sent: bytes) -> None:
    async def body(port: int, streams: list[Echo], _: GrpcServer) -> list[bytes]:
        found = await answers(port, sent)
        assert 7 == found[-1][0], "GOAWAY"
        return await exchanged(port, streams, [b"a"])

    assert [b"a"] == served(body)


def test_a_small_window_of_the_peer_is_kept_to_until_it_gives_more() -> None:
    small = frame(4, 0, 0, (4).to_bytes(2, "big") + (10).to_bytes(4, "big"))

    async def body(port: int, streams: list[Echo], _: GrpcServer) -> tuple[list[int], list[int]]:
        begin = PREFACE + small + frame(1, 4, 1, headers(Encoder())) + frame(0, 0, 1, message(b"x" * 20))
        first = await answers(port, begin, frame(6, 0, 0, b"8 bytes."))
        more = frame(8, 0, 1, (15).to_bytes(4, "big"))
        second = await answers(port, begin, more, frame(6, 0, 0, b"8 bytes."))
        return [len(p) for kind, _, p in first if kind == 0], [len(p) for kind, _, p in second if kind == 0]

    assert ([10], [10, 15]) == served(body)
