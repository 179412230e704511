"""Sends the requests of one run to a frontend and notes what comes of each."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from workload import Request

#: Before a request counts as an error.
REQUEST_S = 120.0


@dataclass
class Row:
    """One request; times in seconds, from the start of the run (``sent``) or from ``sent``."""

    number: int
    kind: str
    prompt: int
    sent: float = 0.0
    first: float | None = None
    total: float | None = None
    cached: int | None = None
    output: int = 0
    promised: int | None = None
    error: str = ""


class Run:
    """:param limit_s: after so many seconds no request is begun any more."""

    def __init__(self, url: str, requests: Sequence[Request], sent: Sequence[bytes], block_size: int) -> None:
        self._url = f"{url}/v1/completions"
        self._requests, self._bodies = requests, sent
        self._block_size = block_size
        self._answered = [asyncio.Event() for _ in requests]
        self.rows: list[Row] = []
        self.seconds = 0.0

    async def go(self, times: Sequence[float], width: int, limit_s: float) -> None:
        """All requests in their order, each at its time, at most ``width`` at once."""
        room, tasks = asyncio.Semaphore(width), []
        timeout = aiohttp.ClientTimeout(total=REQUEST_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            self._began = time.perf_counter()
            for number, at in enumerate(times):
                now = time.perf_counter() - self._began
                if at > now:
                    await asyncio.sleep(at - now)
                await room.acquire()
                if time.perf_counter() - self._began > limit_s:
                    break
                tasks.append(asyncio.create_task(self._one(session, number, room)))
            await asyncio.gather(*tasks)
            self.seconds = time.perf_counter() - self._began

    async def _one(self, session: aiohttp.ClientSession, number: int, room: asyncio.Semaphore) -> None:
        request = self._requests[number]
        row = Row(number, request.kind, len(request.prompt))
        self.rows.append(row)
        try:
            if request.after is not None:
                await self._answered[request.after].wait()
            began = time.perf_counter()
            row.sent = began - self._began
            headers = {"content-type": "application/json"}
            async with session.post(self._url, data=self._bodies[number], headers=headers) as answer:
                if answer.status != 200:
                    row.error = f"HTTP {answer.status}: {(await answer.text())[:200]}"
                else:
                    await self._read(answer, row, began)
            if not row.error and row.output != request.max_tokens:
                row.error = f"expected {request.max_tokens} tokens, got {row.output}"
        except (aiohttp.ClientError, OSError, ValueError) as error:  # a time-out is an OSError
            row.error = f"{type(error).__name__}: {error}"[:200]
        finally:
            self._answered[number].set()
            room.release()

    async def _read(self, answer: aiohttp.ClientResponse, row: Row, began: float) -> None:
        async for line in answer.content:
            if not line.startswith(b"data: "):
                if line.startswith(b"event: error"):
                    row.error = "the stream ended with an error"
                continue
            if row.first is None:
                row.first = time.perf_counter() - began
            # The chunks that are read: the one with the usage, and those in which the router says something.
            if b"prompt_tokens" in line or b"nvext" in line:
                self._note(json.loads(line[6:]), row)
        row.total = time.perf_counter() - began

    def _note(self, chunk: Mapping[str, Any], row: Row) -> None:
        if usage := chunk.get("usage"):
            row.output = usage["completion_tokens"]
            row.prompt = usage["prompt_tokens"]
            row.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        said = chunk.get("nvext") or {}
        rate = (said.get("timing") or {}).get("kv_hit_rate")
        if rate is not None:
            # Dynamo's router says what it expects as a share of the prompt's blocks.
            row.promised = round(rate * -(-row.prompt // self._block_size))


async def texts(url: str, sent: Sequence[bytes]) -> list[str]:
    """The texts that the front end answers with, one request at a time."""
    answers = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_S)) as session:
        for body in sent:
            whole = json.dumps({**json.loads(body), "stream": False, "stream_options": None})
            headers = {"content-type": "application/json"}
            async with session.post(f"{url}/v1/completions", data=whole, headers=headers) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"{url} answers {answer.status}: {(await answer.text())[:300]}")
                answers.append((await answer.json())["choices"][0]["text"])
    return answers


def figures(rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    """What the answers of one run amount to. Requests with an error are counted, and left out of the rest."""
    good = [row for row in rows if not row.error]
    prompt, cached = sum(row.prompt for row in good), sum(row.cached or 0 for row in good)
    return {
        "requests": len(rows),
        "errors": len(rows) - len(good),
        "error_kinds": dict(Counter(row.error[:80] for row in rows if row.error).most_common(5)),
        "unreported": sum(row.cached is None for row in good),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(good) / seconds, 2) if seconds else 0.0,
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "computed_prompt_tokens": prompt - cached,
        "computed_prompt_tokens_per_s": round((prompt - cached) / seconds, 1) if seconds else 0.0,
        "output_tokens": sum(row.output for row in good),
        "output_tokens_per_s": round(sum(row.output for row in good) / seconds, 1) if seconds else 0.0,
        "ttft_ms": quantiles([1e3 * row.first for row in good if row.first is not None]),
        "latency_ms": quantiles([1e3 * row.total for row in good if row.total is not None]),
        "cached_share_by_kind": _by_kind(good),
    }


def said_promises(rows: Sequence[Row], block_size: int) -> dict[str, Any]:
    """What Dynamo's router said in its answers against what the engine reused, in whole blocks."""
    judged = [row for row in rows if not row.error and row.promised is not None and row.cached is not None]
    counts = Counter(
        "exact" if row.promised == (blocks := (row.cached or 0) // block_size)
        else "over" if (row.promised or 0) > blocks
        else "under"
        for row in judged
    )  # fmt: skip
    return shares(counts) | {
        "promised_tokens": block_size * sum(row.promised or 0 for row in judged),
        "reported_tokens": sum(row.cached or 0 for row in judged),
    }


def shares(counts: Mapping[str, int | float]) -> dict[str, Any]:
    """Counts by result, and the share of promises that were kept."""
    judged = sum(counts.get(result, 0) for result in ("exact", "over", "under"))
    exact = counts.get("exact", 0) / judged if judged else None
    return {**{str(name): int(count) for name, count in counts.items()}, "exact_share": exact}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    marks = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    made = {name: ordered[min(len(ordered) - 1, int(len(ordered) * at))] for name, at in marks.items()}
    made |= {"mean": sum(ordered) / len(ordered), "max": ordered[-1]}
    return {name: round(value, 2) for name, value in made.items()}


def _by_kind(rows: Sequence[Row]) -> dict[str, float]:
    prompts: Counter[str] = Counter()
    cached: Counter[str] = Counter()
    for row in rows:
        prompts[row.kind] += row.prompt
        cached[row.kind] += row.cached or 0
    return {kind: round(cached[kind] / tokens, 4) for kind, tokens in sorted(prompts.items())}
