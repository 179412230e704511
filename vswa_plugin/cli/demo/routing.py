"""Who was chosen for each request of ``vswa demo``, what was promised, and what was kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from vswa_plugin.cli.demo.report import Answer, Choice, Tally
from vswa_plugin.errors import ProtocolError
from vswa_plugin.registry import Entry
from vswa_plugin.router.tallies import OTHER
from vswa_plugin.wire.events import id_text

#: What an exact router counts of each worker: finished requests, and the tokens that it promised for them.
_FINISHED, _TOKENS = "vswa_router_predictions_total", "vswa_router_predicted_cached_tokens_total"


class Promises(NamedTuple):
    """Of one worker: ``finished`` requests, and the ``tokens`` promised for them."""

    finished: int = 0
    tokens: int = 0


def promises_of(pages: Iterable[str]) -> dict[int, Promises]:
    """What routers have promised of each worker, by worker id, from their pages of metrics."""
    finished: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for page in pages:
        for family in text_string_to_metric_families(page):
            for name, labels, value, *_ in family.samples:
                if name not in (_FINISHED, _TOKENS) or labels["worker"] == OTHER:
                    continue
                counts = finished if name == _FINISHED else tokens
                counts[int(labels["worker"])] += int(value)
    return {worker_id: Promises(count, tokens[worker_id]) for worker_id, count in finished.items()}


def newly_promised(before: Mapping[int, Promises], now: Mapping[int, Promises]) -> tuple[int, int]:
    """The worker that has finished one request more, and the tokens that were promised for it.

    :raises ProtocolError: not exactly one request has finished.
    """
    more = {
        worker_id: Promises(each.finished - known.finished, each.tokens - known.tokens)
        for worker_id, each in now.items()
        if each != (known := before.get(worker_id, Promises()))
    }
    if len(more) != 1 or any(each.finished != 1 for each in more.values()):
        counts = {id_text(worker_id): each.finished for worker_id, each in more.items()}
        raise ProtocolError(f"expected one finished request more on the routers' /metrics, got {counts}")
    ((worker_id, promised),) = more.items()
    return worker_id, promised.tokens


class Choices:
    """Finds out about one request after the other, none at the same time.

    :param workers: entries of those that compute prompts, which are the ones that are chosen by prefix.
    :param router_pages: reads /metrics of each exact router; None where Dynamo's own router chooses.
    """

    def __init__(
        self,
        tally: Tally,
        workers: Sequence[Entry],
        router_pages: Callable[[], Awaitable[Iterable[str]]] | None = None,
    ) -> None:
        self.block_size = workers[0].block_size
        self.exact = router_pages is not None
        #: A letter per worker.
        self.names = {
            worker_id: chr(ord("A") + number)
            for number, worker_id in enumerate(sorted(entry.worker_id for entry in workers))
        }
        self._tally = tally
        self._component = workers[0].component
        self._router_pages = router_pages
        self._before: dict[int, frozenset[int]] = {}
        self._promised_before: Mapping[int, Promises] = {}

    async def begin(self) -> None:
        """Before a request, when all that came before is counted."""
        self._before = self._tally.held_globally(self._component)
        self._tally.newly_stored.clear()
        if self._router_pages is not None:
            self._promised_before = promises_of(await self._router_pages())

    async def take(self, answer: Answer) -> Choice:
        """After it, when its events are counted.

        :raises ProtocolError: nothing says who was chosen.
        """
        if self._router_pages is None:
            worker_id, promised = self._said(answer)
        else:
            now = promises_of(await self._router_pages())
            worker_id, promised = newly_promised(self._promised_before, now)
        path = self._tally.path_of_newest(self._component)[: answer.prompt_tokens // self.block_size]
        alone = {
            each: self.block_size * sum(1 for _ in takewhile(held.__contains__, path))
            for each, held in self._before.items()
        }
        return Choice(worker_id, promised, alone)

    def kept(self, answer: Answer) -> bool:
        """Whether the engine reused what was promised, in whole blocks."""
        promised = -1 if answer.choice is None else answer.choice.promised // self.block_size
        return promised == answer.cached_tokens // self.block_size

    def _said(self, answer: Answer) -> tuple[int, int]:
        """Dynamo's frontend says so in the answer, of the prompt's blocks as a share of them."""
        try:
            worker_id = int(answer.nvext["worker_id"]["prefill_worker_id"])
            share = float(answer.nvext["timing"]["kv_hit_rate"])
        except (KeyError, TypeError) as error:
            raise ProtocolError(f"expected worker_id and timing in nvext, got {answer.nvext}") from error
        blocks = -(-answer.prompt_tokens // self.block_size)
        return worker_id, round(share * blocks) * self.block_size


def show_choice(number: int, name: str, answer: Answer, choices: Choices) -> None:
    choice, names = answer.choice, choices.names
    assert choice is not None
    print(
        f"  {number:2d}. {name:10} worker {names.get(choice.worker_id, '?')}  promised {choice.promised:4d}, "
        f"reused {answer.cached_tokens:4d} of {answer.prompt_tokens} prompt tokens, "
        f"first token after {answer.first_token_s * 1000:4.0f} ms",
        flush=True,
    )
    worker_id, tokens = choice.best_alone()
    if tokens > answer.cached_tokens:
        print(
            f"      ^ a router that counts the global layers alone would have promised {tokens} tokens on "
            f"worker {names.get(worker_id, '?')}",
            flush=True,
        )


def show_choices(answers: Sequence[Answer], choices: Choices) -> None:
    """A line per worker, and what the global windows alone would have promised."""
    names = choices.names
    chosen = [(answer, answer.choice) for answer in answers if answer.choice is not None]
    columns = ("requests", "prompts", "promised", "reused", "recomputed")
    rows: dict[str, Counter[str]] = {name: Counter() for name in [*sorted(names.values()), "all"]}
    for answer, choice in chosen:
        for row in (names.get(choice.worker_id, "?"), "all"):
            rows.setdefault(row, Counter()).update(
                requests=1,
                prompts=answer.prompt_tokens,
                promised=choice.promised,
                reused=answer.cached_tokens,
                recomputed=answer.prompt_tokens - answer.cached_tokens,
            )
    print("\nchosen, promised and reused, in tokens:")
    print(f"  {'worker':8}" + "".join(f"{column:>12}" for column in columns))
    for name, counts in rows.items():
        print(f"  {name:8}" + "".join(f"{counts[column]:12d}" for column in columns))
    kept = sum(choices.kept(answer) for answer in answers)
    print(f"  {kept} of {len(answers)} promises were kept, in whole blocks.")
    more = [max(0, choice.best_alone()[1] - answer.cached_tokens) for answer, choice in chosen]
    print(
        f"  The global layers alone would have promised {sum(more)} tokens more than was reused, in "
        f"{sum(each > 0 for each in more)} of {len(more)} requests."
    )


def checks_of_choices(answers: Sequence[Answer], choices: Choices, pressed: bool = True) -> dict[str, bool]:
    """What must hold besides where requests go where their prefix is.

    :param pressed: the sliding pools are so small that blocks of theirs must go before global ones.
    """
    size = choices.block_size
    found = [(answer, answer.choice) for answer in answers if answer.choice is not None]
    checks = {
        "every worker was chosen": {choice.worker_id for _, choice in found} == choices.names.keys(),
        "the router promised cached tokens": any(choice.promised for _, choice in found),
    }
    if choices.exact:
        checks["every promise was kept, in whole blocks"] = all(choices.kept(answer) for answer in answers)
    if choices.exact and pressed:
        checks["the global layers alone would have promised what no worker could resume"] = any(
            choice.best_alone()[1] // size > answer.cached_tokens // size for answer, choice in found
        )
    return checks
