"""What the status pages of workers and the API of a router say, beside what the event streams say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping

import aiohttp
import msgspec

from vswa_plugin.registry import Entry
from vswa_plugin.router.http.overview import Overview
from vswa_plugin.wire.events import Rank

logger = logging.getLogger(__name__)

#: Between two rounds, and for one page to come.
EVERY_S, TIMEOUT_S = 2.0, 1.0
#: No page is longer: some 4,000 ranks of a router.
MAX_BYTES = 8 << 20
#: Pages that are read at the same time.
_AT_ONCE = 16


class WorkerNumbers(msgspec.Struct, frozen=True):
    """Of one worker's page.

    :param load: requests under way.
    :param prompt_tokens: of requests that have ended; ``cached_tokens``: of these, reused.
    """

    load: int | None = None
    prompt_tokens: float = 0
    cached_tokens: float = 0

    @property
    def hit(self) -> float | None:
        """Share of the prompt tokens that was reused."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


def worker_numbers(page: str) -> WorkerNumbers:
    """The numbers of a worker's metrics; raises ValueError where the text is none.

    Cached tokens of a decode worker were handed over to it: they say nothing of its cache.
    """
    from prometheus_client.parser import text_string_to_metric_families

    load, tokens = None, {"vswa_prompt_tokens_total": 0.0, "vswa_cached_tokens_total": 0.0}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "vswa_worker_requests_in_flight":
                load = (load or 0) + int(sample.value)
            elif sample.name in tokens and sample.labels.get("mode") != "decode":
                tokens[sample.name] += sample.value
    return WorkerNumbers(load, tokens["vswa_prompt_tokens_total"], tokens["vswa_cached_tokens_total"])


class Pages:
    """Reads the pages again and again. What cannot be read has no numbers: the display shows a dash.

    :param entries: live workers, as a fleet keeps them.
    :param router: URL of a router's API; None: no promises are known.
    """

    def __init__(self, entries: Mapping[str, Entry], router: str | None = None) -> None:
        self.workers: dict[int, WorkerNumbers] = {}
        #: Share of promises kept, of ranks of which some were compared.
        self.kept: dict[Rank, float] = {}
        self._entries = entries
        self._router = router
        self._gate = asyncio.Semaphore(_AT_ONCE)

    async def follow(self) -> None:
        """Until cancelled."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                await self.read(session)
                await asyncio.sleep(EVERY_S)

    async def read(self, session: aiohttp.ClientSession) -> None:
        """All pages once."""
        urls = {each.worker_id: each.status_url for each in self._entries.values() if each.status_url}
        pages = await asyncio.gather(*(self._get(session, f"{url}/metrics") for url in urls.values()))
        self.workers = dict(_read(urls, pages))
        if self._router is not None:
            page = await self._get(session, f"{self._router.rstrip('/')}/overview")
            self.kept = {} if page is None else kept_of(page)

    async def _get(self, session: aiohttp.ClientSession, url: str) -> bytes | None:
        """The content; None where it does not come, is an error, or is too long."""
        try:
            async with self._gate, session.get(url) as answer:
                if answer.status == 200:
                    content = await answer.content.read(MAX_BYTES + 1)
                    rest = await answer.content.read()
                    return None if len(content) + len(rest) > MAX_BYTES else content + rest
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # ValueError: no URL
            logger.debug("%s cannot be read: %s", url, error)
        return None


def _read(urls: Iterable[int], pages: Iterable[bytes | None]) -> Iterable[tuple[int, WorkerNumbers]]:
    for worker_id, page in zip(urls, pages, strict=True):
        if page is not None:
            try:
                yield worker_id, worker_numbers(page.decode())
            except ValueError as error:
                logger.debug("the metrics of worker %d cannot be read: %s", worker_id, error)


def kept_of(page: bytes) -> dict[Rank, float]:
    """Of a router's ``/overview`` the share of promises kept, by rank; empty where it is none."""
    try:
        overview = msgspec.json.decode(page, type=Overview)
    except (msgspec.MsgspecError, UnicodeError) as error:
        logger.debug("the router's overview cannot be read: %s", error)
        return {}
    counted = {}
    for each in overview.ranks:
        promises = each.promises
        compared = promises.exact + promises.over + promises.under
        if compared and each.worker_id.isdecimal():
            counted[Rank(int(each.worker_id), each.dp_rank)] = promises.exact / compared
    return counted
