"""One model as a router serves it: its workers by what they do, their load, and how they are called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import msgspec
from xxhash import xxh3_64_hexdigest

from vswa_plugin.blocks.layout import Naming
from vswa_plugin.dynamo.client import FrontEndpoint, ModelCard, WorkerClient
from vswa_plugin.engine.contract import MODES
from vswa_plugin.registry import Entry, oddity
from vswa_plugin.selection import LoadBook, NoCandidate
from vswa_plugin.wire.events import Rank


class Pool(msgspec.Struct):
    """The ranks of one model that serve the same phases, and what this router has put on them.

    :param book: shared with the model's other pools.
    :param ranks: of all workers that may be used, in no order.
    :param taints: labels by worker id.
    :param phase: what they do: ``agg``, ``prefill`` or ``decode``.
    """

    model: str
    naming: Naming
    book: LoadBook
    ranks: tuple[Rank, ...] = ()
    taints: Mapping[int, frozenset[str]] = {}
    phase: str = "agg"

    @property
    def block_size(self) -> int:
        """Tokens of the blocks that load and reuse are counted in."""
        return self.naming.block_size


class Model:
    """One model: its ranks with their load, how its workers are called, and where it is shown.

    :ivar pool: ranks that do both phases; ``prefill`` and ``decode``: those that do one.
    :ivar card: how it is shown now; None: not at all.
    :ivar provisional: the card was made while a phase lacked: the workers of that phase may want another one.
    :ivar unserved_since: when its last worker left, by the event loop; None while there are workers.
    """

    def __init__(self, name: str, naming: Naming, book: LoadBook | None = None) -> None:
        self.name = name
        book = LoadBook(naming.block_size) if book is None else book
        self.pool = Pool(name, naming, book)
        self.prefill = Pool(name, naming, book, phase="prefill")
        self.decode = Pool(name, naming, book, phase="decode")
        self.clients: dict[int, WorkerClient] = {}
        self.endpoint: FrontEndpoint | None = None
        self.card: ModelCard | None = None
        self.provisional = False
        self.unserved_since: float | None = None
        self.retry_at = 0.0

    @property
    def pools(self) -> tuple[Pool, Pool, Pool]:
        return self.pool, self.prefill, self.decode

    def missing(self) -> str | None:
        """Why it cannot be served with the workers that there are, or None."""
        return _missing([pool.phase for pool in self.pools if pool.ranks])

    def reachable(self) -> set[int]:
        """Workers that Dynamo's discovery lists now."""
        listed: set[int] = set()
        for client in set(self.clients.values()):
            listed.update(client.instance_ids())
        return listed

    def apart(self) -> bool:
        """Whether the next request goes to a prefill and a decode worker: where both are there, it does.

        :raises NoCandidate: no workers can serve it now; names the kind that is missing.
        """
        if not (self.prefill.ranks or self.decode.ranks):
            return False
        reachable = self.reachable()
        there = [pool.phase for pool in self.pools if any(r.worker_id in reachable for r in pool.ranks)]
        if (missing := _missing(there)) is not None:
            raise NoCandidate(missing)
        return "prefill" in there and "decode" in there


def _missing(phases: Collection[str]) -> str | None:
    """Why workers that do ``phases`` cannot serve together, or None."""
    if not phases:
        return "no worker serves this model right now"
    if "agg" in phases or len(phases) == 2:
        return None
    lacking = "decode" if "prefill" in phases else "prefill"
    return (
        f"no {lacking} worker serves this model right now, and its {next(iter(phases))} workers cannot "
        f"alone; start a worker with --mode {lacking}"
    )


class Group(msgspec.Struct, frozen=True):
    """The workers of one model that fit together, and those that do not, with the reason.

    :param used: at least one, as :func:`grouped` makes it.
    """

    used: tuple[Entry, ...] = ()
    refused: tuple[tuple[Entry, str], ...] = ()


def grouped(entries: Iterable[Entry], modes: Collection[str] = ("agg",)) -> dict[str, Group]:
    """Workers of ``modes`` by model, without those that :func:`oddity` names.

    Workers of a model must agree on block sizes, lookahead and hash scheme, else one hash of a prompt cannot
    score them all, nor one hand a prompt over to another: those that most share are used, of two as frequent
    those of the oldest worker.
    """
    by_model: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.mode in modes and oddity(entry) is None:
            by_model.setdefault(entry.served_model_name, []).append(entry)
    return {name: _consistent(of_model) for name, of_model in sorted(by_model.items())}


class Groups:
    """What :func:`grouped` makes of workers of all modes, made anew only where they have changed.

    :param entries: live workers by registry key, as a fleet keeps them.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._seen: dict[str, Entry] = {}
        self._groups: dict[str, Group] = {}

    def now(self) -> dict[str, Group]:
        """By model; the same object as before where nothing has changed."""
        if self._entries != self._seen:
            self._seen = dict(self._entries)
            self._groups = grouped(self._seen.values(), MODES)
        return self._groups


def _consistent(entries: list[Entry]) -> Group:
    entries = sorted(entries, key=lambda entry: (min(entry.epochs.values(), default=0), entry.key))
    counts = Counter((entry.naming, entry.hash_scheme) for entry in entries)
    common = counts.most_common(1)[0][0]  # of equals the first met, which is the oldest worker's
    used, refused = [], []
    for entry in entries:
        if (entry.naming, entry.hash_scheme) == common:
            used.append(entry)
        else:
            reason = (
                f"expected {_shown(*common)} as of the model's other workers, got "
                f"{_shown(entry.naming, entry.hash_scheme)}; start it with the same tokens_per_block"
            )
            refused.append((entry, reason))
    return Group(tuple(used), tuple(refused))


def _shown(naming: Naming, scheme: str) -> str:
    finer = f" named every {naming.hash_block_size} tokens" if not naming.by_blocks else ""
    ahead = f" with a lookahead of {naming.lookahead}" if naming.lookahead else ""
    return f"block size {naming.block_size}{finer}{ahead} and hash scheme {scheme}"


def not_used(entries: Iterable[Entry], groups: Iterable[Group]) -> dict[str, str]:
    """Of each worker that is not used the reason, for :class:`Faults`: of ``groups``, and of odd entries."""
    refused = [each for group in groups for each in group.refused]
    refused += [(entry, reason) for entry in entries if (reason := oddity(entry)) is not None]
    return {f"worker {entry.worker_id} is not used": reason for entry, reason in refused}


def set_ranks(model: Model, used: Collection[Entry]) -> None:
    """Let the model's pools be the workers ``used``, each in the pool of its mode."""
    taints = {entry.worker_id: frozenset(entry.taints) for entry in used}
    for pool in model.pools:
        pool.taints = taints
        pool.ranks = tuple(
            Rank(entry.worker_id, dp_rank)
            for entry in used
            if entry.mode == pool.phase
            for dp_rank in sorted(entry.epochs)
        )


def slug_of(model: str) -> str:
    """A model's name as part of an endpoint's; different models never get the same."""
    slug = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    return slug if slug == model else f"{slug}-{xxh3_64_hexdigest(model.encode())[:6]}"
