"""Clients that stream answers whose right text is known, one request after the other."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import aiohttp

MODEL = "gemma"
CLIENTS, PROMPTS, TOKENS = 6, 12, 24
#: A stream that takes that long hangs.
HUNG_S = 60.0


class Answer(NamedTuple):
    """:ivar outcome: ``right``, ``wrong``, ``hung``, or what went wrong as an HTTP client sees it."""

    began: float
    ended: float
    outcome: str


def prompt(number: int) -> str:
    """Prompts with shared beginnings, of some blocks each."""
    lines = [f"{number % 3} {line}: entry {line * 37 % 101} follows {line}." for line in range(8)]
    return "\n".join([*lines, f"Question {number}:"])


class Load:
    """:ivar answers: in the order in which they ended."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/completions"
        self._right: dict[int, str] = {}
        self._numbers = itertools.count()
        self.answers: list[Answer] = []

    async def learn(self) -> None:
        """Ask for each answer once, while nothing is wrong."""
        async with _session() as session:
            for number in range(PROMPTS):
                outcome, text = await self._stream(session, number)
                assert outcome == "whole" and text, f"expected an answer to learn, got {outcome}"
                self._right[number] = text

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with _session() as session:
            tasks = [asyncio.create_task(self._client(session)) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def since(self, moment: float) -> list[Answer]:
        return [answer for answer in self.answers if answer.ended > moment]

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while True:
            number, began = next(self._numbers) % PROMPTS, now()
            outcome, text = await self._stream(session, number)
            if outcome == "whole":
                outcome = "right" if text == self._right[number] else "wrong"
            self.answers.append(Answer(began, now(), outcome))
            if outcome != "right":
                await asyncio.sleep(0.1)  # as a client that tries again

    async def _stream(self, session: aiohttp.ClientSession, number: int) -> tuple[str, str]:
        """``whole`` and the text, or how it ended."""
        body = {
            "model": MODEL,
            "prompt": prompt(number),
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
        }
        try:
            async with asyncio.timeout(HUNG_S), session.post(self._url, json=body) as answer:
                if answer.status != 200:
                    return f"status {answer.status}", ""
                return await _read(answer)
        except TimeoutError:
            return "hung", ""
        except aiohttp.ClientError:
            return "connection lost", ""


async def _read(answer: aiohttp.ClientResponse) -> tuple[str, str]:
    """A stream is whole when its last choice has a reason to end, and no error came before."""
    text, reason = "", None
    async for line in answer.content:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            if line.startswith(b"event: error"):
                return "error in the stream", ""
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if "error" in chunk or "choices" not in chunk:
            return "error in the stream", ""
        for choice in chunk["choices"]:
            text += choice.get("text") or ""
            reason = choice.get("finish_reason") or reason
    return ("whole", text) if reason in ("length", "stop") else ("cut", "")


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def now() -> float:
    return asyncio.get_running_loop().time()


def longest_gap(answers: list[Answer], since: float, until: float) -> float:
    """The longest time in which no client got a right answer."""
    ends = sorted(
        answer.ended for answer in answers if answer.outcome == "right" and since < answer.ended < until
    )
    return max(later - earlier for earlier, later in itertools.pairwise([since, *ends, until]))


def outcomes(answers: list[Answer]) -> dict[str, int]:
    return dict(Counter(answer.outcome for answer in answers))
