"""Chunks of a stream that come in a burst, passed on together.

Each chunk goes through a front door's Python twice, in and out, at some 90 us of CPU. Of a stream with up to
500 chunks a second a client sees every one when it comes; of a faster one, the same tokens in fewer chunks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from vswa_plugin.engine.contract import ChunkDict

#: Chunks of one stream are passed on this far apart at least, the first and the last excepted.
APART_S = 0.002

#: Of each token, one after the other.
_LISTS = ("token_ids", "log_probs", "top_logprobs")
#: What a chunk has that can be joined with the next one; all else belongs at its place in the stream.
_PLAIN = frozenset((*_LISTS, "index", "cum_log_probs"))


async def joined(
    chunks: AsyncIterator[ChunkDict],
    apart_s: float = APART_S,
    lost: asyncio.Future[Exception] | None = None,
) -> AsyncIterator[ChunkDict]:
    """The stream's chunks, without delay while they come ``apart_s`` apart; of a burst, some joined.

    Asks for one chunk ahead. Raises what ``chunks`` raises, after all that came before it.

    :param lost: gets an error when no more chunks will come; it is raised then.
    """
    loop = asyncio.get_running_loop()
    due = 0.0
    ahead = _next(chunks)
    if lost is not None:
        lost.add_done_callback(lambda _: ahead.cancel())
    try:
        while True:
            if lost is not None and lost.done():
                raise lost.result()
            try:
                chunk = await ahead
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                if lost is not None and lost.done():
                    continue
                raise
            ahead = _next(chunks)
            while (wait_s := due - loop.time()) > 0 and _PLAIN.issuperset(chunk):
                if not ahead.done():
                    await asyncio.wait((ahead,), timeout=wait_s)
                if not _follows(ahead, chunk):
                    break
                chunk = _join(chunk, ahead.result())
                ahead = _next(chunks)
            yield chunk
            due = loop.time() + apart_s
    finally:
        ahead.cancel()  # asyncio then does not warn of an error in it that was not retrieved


def _next(chunks: AsyncIterator[ChunkDict]) -> asyncio.Future[ChunkDict]:
    return asyncio.ensure_future(anext(chunks))


def _follows(ahead: asyncio.Future[ChunkDict], chunk: ChunkDict) -> bool:
    """Whether what is ``ahead`` has come and can be joined to ``chunk``: of the same choice and lists."""
    if not ahead.done() or ahead.cancelled() or ahead.exception() is not None:
        return False
    more = ahead.result()
    if more.get("index") != chunk.get("index"):
        return False
    return all(isinstance(more.get(name), list) == isinstance(chunk.get(name), list) for name in _LISTS)


def _join(chunk: ChunkDict, more: ChunkDict) -> ChunkDict:
    """``more`` with the tokens of ``chunk`` before its own."""
    for name in _LISTS:
        if tokens := chunk.get(name):
            more[name] = tokens + more[name]
    return more
