"""Requests to be routed: made up, or from a trace in Mooncake's format. Pure but for the file.

Requests are made one after the other and never kept: a run may be longer than memory. The same seed gives
the same requests and times to every policy.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import msgspec

from vswa_plugin.accuracy import jsonl
from vswa_plugin.errors import ConfigError

#: Token ids of made-up prompts and answers are below this.
VOCABULARY = 32_000
#: Tokens that one of Mooncake's ``hash_ids`` stands for.
MOONCAKE_BLOCK = 512

Tokens: TypeAlias = tuple[int, ...]


class Request(NamedTuple):
    """One request: its prompt, and what it is answered, wherever it goes."""

    prompt: Tokens
    output: Tokens


class Arrival(NamedTuple):
    """A request and when it comes, in seconds from the start."""

    at_s: float
    request: Request


def answer(prompt: Tokens, length: int) -> Tokens:
    """Made-up tokens that depend on the prompt alone, so that a next turn can hold them."""
    state = zlib.crc32(array("I", prompt[-64:]).tobytes(), len(prompt))
    tokens = []
    for _ in range(length):
        state = (state * 1_103_515_245 + 12_345) % (1 << 31)
        tokens.append((state >> 8) % VOCABULARY)
    return tuple(tokens)


def poisson(requests: Iterable[Request], rate: float, seed: int) -> Iterator[Arrival]:
    """``requests`` at random times, ``rate`` a second on average."""
    rng, at_s = random.Random(f"times {seed}"), 0.0
    for request in requests:
        at_s += rng.expovariate(rate)
        yield Arrival(at_s, request)


# -- made up -----------------------------------------------------------------------------------------


def made_up(name: str, seed: int) -> Iterator[Request]:
    """Endless requests of one of :data:`WORKLOADS`."""
    return WORKLOADS[name](random.Random(f"{name} {seed}"))


def _words(rng: random.Random, least: int, most: int) -> Tokens:
    return tuple(rng.choices(range(VOCABULARY), k=rng.randint(least, most)))


def _request(rng: random.Random, prompt: Tokens, least: int, most: int) -> Request:
    return Request(prompt, answer(prompt, rng.randint(least, most)))


class _Turns:
    """Conversations that take turns; one that has just had its turn waits for others first."""

    def __init__(self, rng: random.Random, count: int) -> None:
        self._rng = rng
        self._waiting: list[Tokens | None] = [None] * count

    def next(self) -> Tokens | None:
        """What one conversation has come to; None: begin a new one. Give it back with :meth:`done`."""
        return self._waiting.pop(self._rng.randrange((len(self._waiting) + 1) // 2))

    def done(self, context: Tokens | None) -> None:
        self._waiting.append(context)


def _chat(rng: random.Random) -> Iterator[Request]:
    systems = [_words(rng, 200, 400) for _ in range(3)]
    turns = _Turns(rng, 64)
    while True:
        context = turns.next() or rng.choice(systems)
        request = _request(rng, context + _words(rng, 20, 250), 40, 300)
        yield request
        ends = len(request.prompt) > 8_000 or rng.random() < 0.06
        turns.done(None if ends else request.prompt + request.output)


def _documents(rng: random.Random) -> Iterator[Request]:
    documents = [_words(rng, 1_000, 6_000) for _ in range(60)]
    popularity = [1 / rank for rank in range(1, len(documents) + 1)]
    while True:
        (document,) = rng.choices(documents, popularity)
        yield _request(rng, document + _words(rng, 20, 150), 50, 200)


def _agents(rng: random.Random) -> Iterator[Request]:
    tools = [_words(rng, 1_500, 2_500) for _ in range(4)]
    turns = _Turns(rng, 40)
    while True:
        context = turns.next() or rng.choice(tools) + _words(rng, 50, 500)
        request = _request(rng, context, 20, 150)
        yield request
        result = _words(rng, 50, rng.choice((200, 800, 2_500)))
        ends = len(request.prompt) > 16_000
        turns.done(None if ends else request.prompt + request.output + result)


def _forks(rng: random.Random) -> Iterator[Request]:
    trees: list[list[Tokens]] = [[] for _ in range(24)]
    while True:
        tree = rng.choice(trees)
        if not tree or rng.random() < 0.02:
            tree[:] = [_words(rng, 2_000, 5_000)]
        prompt = rng.choice(tree)
        prompt = prompt[: rng.randint(len(prompt) // 2, len(prompt))] + _words(rng, 50, 800)
        request = _request(rng, prompt, 20, 200)
        yield request
        tree.append(prompt)
        del tree[1:-12]


def _burst(rng: random.Random) -> Iterator[Request]:
    """Now and then most requests are about one document that nobody had before."""
    calm = _documents(rng)
    while True:
        for _ in range(rng.randint(80, 120)):
            yield next(calm)
        hot = _words(rng, 3_000, 6_000)
        for _ in range(60):
            if rng.random() < 0.8:
                yield _request(rng, hot + _words(rng, 20, 150), 50, 200)
            else:
                yield next(calm)


def _tenants(rng: random.Random) -> Iterator[Request]:
    """A loud tenant with new prompts behind one system prompt, and a quiet one whose documents come again."""
    system, quiet = _words(rng, 400, 600), _documents(rng)
    while True:
        if rng.random() < 0.3:
            yield next(quiet)
        else:
            yield _request(rng, system + _words(rng, 500, 3_000), 50, 200)


#: Built-in workload -> its requests; docs/accuracy.md describes them.
WORKLOADS: Mapping[str, Callable[[random.Random], Iterator[Request]]] = {
    "chat": _chat,
    "documents": _documents,
    "agents": _agents,
    "forks": _forks,
    "burst": _burst,
    "tenants": _tenants,
}


# -- Mooncake ----------------------------------------------------------------------------------------


class _Line(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)], ...]


_decoder = msgspec.json.Decoder(_Line)
_EXPECTED = (
    "a request in Mooncake's format, a JSON object with timestamp, input_length, output_length and hash_ids"
)


def mooncake(path: Path, count: int | None = None) -> Iterator[Arrival]:
    """The first ``count`` requests of a trace in Mooncake's format, at the times that it gives.

    Each of ``hash_ids`` becomes 512 tokens of its own.

    :param path: JSON Lines, plain or gzip.
    :raises ConfigError: a line that is no such request, with its number.
    """
    before = 0.0
    try:
        with path.open("rb") as raw:
            for number, each in islice(jsonl.read(path, raw, _decoder, _EXPECTED), count):
                blocks = -(-each.input_length // MOONCAKE_BLOCK)
                if len(each.hash_ids) != blocks or each.timestamp < before:
                    raise ConfigError(
                        f"{path}, line {number}: expected a hash id for each of {blocks} blocks of "
                        f"{MOONCAKE_BLOCK} tokens and a timestamp of at least {before:g} ms, got "
                        f"{len(each.hash_ids)} ids and {each.timestamp:g} ms"
                    )
                before = each.timestamp
                yield Arrival(each.timestamp / 1e3, _of_mooncake(each))
    except OSError as error:
        raise ConfigError(f"expected a workload at {path}: {error.strerror or error}") from error


def _of_mooncake(line: _Line) -> Request:
    prompt: list[int] = []
    for hash_id in line.hash_ids:
        prompt += [hash_id] * MOONCAKE_BLOCK
    return Request(tuple(prompt[: line.input_length]), (0,) * line.output_length)
