"""Answers of the API from fleet and index. Event loop only; nothing is changed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from vswa_plugin.blocks.hashing import sequence_hashes
from vswa_plugin.blocks.layout import FULL
from vswa_plugin.errors import InvalidRequest, RequestError, unknown_choice
from vswa_plugin.following.fleet import Fleet, RankStatus
from vswa_plugin.index import WindowIndex
from vswa_plugin.registry import Entry
from vswa_plugin.router.decide import Decider, Hasher, PromptHashes, hashed_prompt
from vswa_plugin.router.http.messages import (
    ChoiceAnswer,
    ExplanationAnswer,
    HashQuery,
    InstanceAnswer,
    Listener,
    ModelWish,
    Query,
    QueryAnswer,
    RankAnswer,
    RankText,
    ReadyAnswer,
    WorkerAnswer,
)
from vswa_plugin.router.pools import Groups, Model
from vswa_plugin.selection import NoCandidate
from vswa_plugin.wire.events import Rank, Source, id_text
from vswa_plugin.wire.subjects import subject

#: Blocks times ranks times groups that one explanation may look at: some 100 ms.
MAX_EXPLAINED = 300_000
_ONE_MORE = "isl_tokens was not given: the prompt is taken as one token longer than its blocks"
#: State of our view -> Dynamo's word for a listener, worst first.
_STATUS = {
    "unreadable": "failed",
    "waiting": "pending",
    "silent": "paused",
    "stale": "paused",
    "live": "active",
}
_WORST_FIRST = ("failed", "pending", "paused", "active")


class UnknownModel(RequestError):
    """No worker serves it."""


class TooLarge(RequestError):
    """Answering it would hold up the requests that are being routed."""


class ServedPrompt:
    """A prompt of a served model.

    :param assumed: what the request did not give and was assumed, in words.
    """

    def __init__(self, served: Served, prompt: PromptHashes, assumed: str | None) -> None:
        self.served = served
        self.hashes, self.names = prompt.hashes, prompt.names
        self.length = prompt.length
        self.assumed = assumed


class Served:
    """A model and its workers: those that fit together."""

    def __init__(self, name: str, entries: Sequence[Entry]) -> None:
        self.name = name
        self.entries = entries
        self.naming = entries[0].naming
        self.block_size = self.naming.block_size
        self.ranks = [Rank(entry.worker_id, dp_rank) for entry in entries for dp_rank in sorted(entry.epochs)]


def served(groups: Groups, wish: ModelWish) -> Served:
    """The model that is wished for, else the only one.

    :raises UnknownModel: no worker serves it.
    :raises InvalidRequest: there are several, and no wish.
    """
    by_model = groups.now()
    name = wish.model_name or wish.model
    if name is None:
        if len(by_model) > 1:
            raise InvalidRequest(
                "model_name: expected one where several models are served, got none. "
                f"Known: {', '.join(sorted(by_model))}"
            )
        if not by_model:
            raise UnknownModel("expected a worker in the registry, got none; see /workers")
        (name,) = by_model
    if name not in by_model:
        raise UnknownModel(f"model_name: {unknown_choice('model', name, by_model)}")
    return Served(name, by_model[name].used)


def prompt_of(groups: Groups, hasher: Hasher, query: Query) -> ServedPrompt:
    """Raises InvalidRequest or UnknownModel."""
    model = served(groups, query)
    if query.token_ids is None:
        raise InvalidRequest("token_ids: expected the prompt, got none")
    prompt = hashed_prompt(hasher, query.token_ids, model.naming, query.cache_salt, query.lora_name)
    return ServedPrompt(model, prompt, None)


def prompt_of_hashes(groups: Groups, query: HashQuery) -> ServedPrompt:
    """Raises InvalidRequest or UnknownModel."""
    model = served(groups, query)
    values = query.sequence_hashes or query.block_hashes
    if values is None:
        raise InvalidRequest("expected block_hashes or sequence_hashes, got neither")
    if max(values) >= 2**64:
        raise InvalidRequest(f"expected hashes below 2**64, got {max(values)}")
    size, length = model.block_size, query.isl_tokens
    if not model.naming.by_blocks:
        raise InvalidRequest(
            f"expected token ids for {model.name!r}, whose prefixes are not named by blocks of {size} "
            "tokens, got hashes; ask /query"
        )
    hashes = query.sequence_hashes or sequence_hashes(values)
    if length is None:
        length, assumed = len(hashes) * size + 1, _ONE_MORE
    else:
        hashes, assumed = hashes[: length // size], None
    return ServedPrompt(model, PromptHashes(length, hashes, hashes), assumed)


def query_answer(fleet: Fleet, prompt: ServedPrompt) -> QueryAnswer:
    """What every rank of the model would reuse of the prompt."""
    model, size = prompt.served, prompt.served.block_size
    ranks = rank_answers(fleet, prompt)
    instances = {id_text(entry.worker_id): instance_answer(entry, ranks, size) for entry in model.entries}
    return QueryAnswer(
        model_name=model.name,
        block_size=size,
        prompt_tokens=prompt.length,
        assumed=prompt.assumed,
        scores={worker: answer.dp for worker, answer in instances.items()},
        frequencies=_frequencies([answer.cached_blocks for answer in ranks.values()]),
        instances=instances,
    )


def rank_answers(
    fleet: Fleet,
    prompt: ServedPrompt,
    workers: Collection[int] | None = None,
    *,
    reads_cache: bool = True,
) -> dict[Rank, RankAnswer]:
    """What every rank of the model would reuse of the prompt.

    :param workers: only the ranks of these; None: of all.
    :param reads_cache: False: nothing, because the request switches the cache off.
    """
    index, model, hashes = fleet.index, prompt.served, prompt.names
    cached = index.score(hashes, prompt.length, model.name) if reads_cache else {}
    blind = global_only(index, hashes, model.name)
    now = asyncio.get_running_loop().time()
    answers = {}
    for rank in model.ranks:
        if workers is not None and rank.worker_id not in workers:
            continue
        view = fleet.subscriber.view(rank)
        tokens = cached.get(rank, 0)
        answers[rank] = RankAnswer(
            cached_tokens=tokens,
            cached_blocks=tokens // model.block_size,
            tiers=index.tiers(rank, hashes, tokens) if tokens else {},
            global_only_tokens=blind.get(rank, 0),
            state="waiting" if view is None else view.state,
            scored=view is not None and view.scored(now),
        )
    return answers


def global_only(index: WindowIndex, hashes: Sequence[int], model: str) -> dict[Rank, int]:
    """Tokens of the prompt that the group with the widest window holds without a hole, of each rank with any.

    That is all that a router knows which takes no notice of sliding windows.
    """
    depths: dict[Rank, int] = {}
    for part in index.parts(model):
        groups = part.layout.groups
        widest = max(
            range(len(groups)), key=lambda at: (groups[at].kind == FULL, groups[at].window_size or 0)
        )
        size = groups[widest].block_size
        stride = size // part.hash_block_size
        blocks = part.table.masks(widest, hashes)[stride - 1 :: stride]
        bits = {member.bit: rank for rank, member in part.members.items() if member.scored}
        remaining = sum(1 << bit for bit in bits)
        for depth, mask in enumerate([*blocks, 0]):
            ended, remaining = remaining & ~mask, remaining & mask
            while depth and ended:
                bit = ended.bit_length() - 1
                depths[bits[bit]] = depth * size
                ended ^= 1 << bit
            if not remaining:
                break
    return depths


def instance_answer(entry: Entry, ranks: Mapping[Rank, RankAnswer], block_size: int) -> InstanceAnswer:
    own = {dp_rank: ranks[Rank(entry.worker_id, dp_rank)] for dp_rank in sorted(entry.epochs)}
    device = {str(dp_rank): _device_tokens(answer, block_size) for dp_rank, answer in own.items()}
    return InstanceAnswer(
        longest_matched=max(answer.cached_tokens for answer in own.values()),
        gpu=max(device.values()),
        dp=device,
        cpu=max(answer.cached_tokens - answer.tiers.get("disk", 0) * block_size for answer in own.values()),
        disk=max(answer.cached_tokens for answer in own.values()),
        ranks={str(dp_rank): answer for dp_rank, answer in own.items()},
    )


def _device_tokens(answer: RankAnswer, block_size: int) -> int:
    slow = answer.tiers.get("host", 0) + answer.tiers.get("disk", 0)
    return answer.cached_tokens - slow * block_size


def _frequencies(blocks: Sequence[int]) -> list[int]:
    deepest = max(blocks, default=0)
    ends = Counter(blocks)
    counts, remaining = [], len(blocks)
    for depth in range(deepest):
        remaining -= ends[depth]
        counts.append(remaining)
    return counts


def explanations(fleet: Fleet, prompt: ServedPrompt) -> list[ExplanationAnswer]:
    """As ``vswa explain`` does.

    :raises TooLarge: so many blocks, ranks and groups that routing would wait for it.
    """
    model = prompt.served
    groups = max((len(entry.groups) for entry in model.entries), default=1)
    work = len(prompt.names) * len(model.ranks) * groups
    if work > MAX_EXPLAINED:
        most = MAX_EXPLAINED // (len(model.ranks) * groups)
        raise TooLarge(
            f"expected a prompt of at most {most} blocks for {len(model.ranks)} ranks with {groups} groups, "
            f"got {len(prompt.names)}; ask /query, or `vswa explain` for the whole of it"
        )
    found = fleet.index.explain(prompt.names, prompt.length, model.name)
    return [ExplanationAnswer.of(each) for each in found]


def choice_answers(decider: Decider, models: Mapping[str, Model], prompt: ServedPrompt) -> list[ChoiceAnswer]:
    """What a request with the prompt would cost on each rank, and which would be chosen.

    :raises NoCandidate: no worker serves the model.
    """
    model = models.get(prompt.served.name)
    if model is None or not any(pool.ranks for pool in model.pools):
        raise NoCandidate("no worker serves this model right now; see /workers")
    hashed = PromptHashes(prompt.length, prompt.hashes, prompt.names)
    return [
        ChoiceAnswer(
            RankText(id_text(each.scored.rank.worker_id), each.scored.rank.dp_rank),
            pool.phase,
            each.scored.candidate.cached_tokens,
            each.scored.cost + each.added,
            each.added,
            each.chosen,
            dict(each.terms),
        )
        for pool in model.pools
        if pool.ranks
        for each in decider.weighed(pool, hashed)
    ]


def worker_answers(fleet: Fleet, model_name: str | None = None) -> list[WorkerAnswer]:
    """All workers in the registry, of one model where it is given."""
    statuses = {status.source.rank: status for status in fleet.statuses(time.time_ns())}
    return [
        _worker(entry, statuses)
        for _, entry in sorted(fleet.entries.items())
        if model_name in (None, entry.served_model_name)
    ]


def _worker(entry: Entry, statuses: Mapping[Rank, RankStatus]) -> WorkerAnswer:
    listeners = {
        str(dp_rank): _listener(entry, dp_rank, statuses.get(Rank(entry.worker_id, dp_rank)))
        for dp_rank in sorted(entry.epochs)
    }
    return WorkerAnswer(
        instance_id=id_text(entry.worker_id),
        source="nats",
        status=min((each.status for each in listeners.values()), key=_WORST_FIRST.index, default="pending"),
        model_name=entry.served_model_name,
        routing_group="default",
        block_size=entry.block_size,
        endpoints={dp_rank: listener.endpoint for dp_rank, listener in listeners.items()},
        listeners=listeners,
        endpoint=endpoint_of(entry),
        mode=entry.mode,
        engine=entry.engine,
        rule=entry.rule,
        groups=entry.groups,
    )


def endpoint_of(entry: Entry) -> str:
    return f"dyn://{entry.namespace}.{entry.component}.{entry.endpoint}"


def _listener(entry: Entry, dp_rank: int, status: RankStatus | None) -> Listener:
    source = Source(entry.namespace, entry.component, entry.worker_id, dp_rank)
    state = "waiting" if status is None else status.state
    return Listener(
        endpoint=subject(source, "events"),
        status=_STATUS[state],
        state=state,
        epoch=0 if status is None else status.epoch,
        next_event_id=0 if status is None else status.next_event_id,
        lag_ms=None if status is None else status.lag_ms,
        blocks={} if status is None else status.blocks,
        last_error="" if status is None or state == "live" else status.reason,
    )


def ready_answer(fleet: Fleet, ready: bool, reason: str | None) -> ReadyAnswer:
    """Ready: requests can be answered, and at least one rank is known exactly.

    :param ready: whether the router itself is ready; ``reason``: why it is not.
    """
    live: dict[str, int] = {}
    for entry in fleet.entries.values():
        count = sum(fleet.subscriber.live(Rank(entry.worker_id, dp_rank)) for dp_rank in entry.epochs)
        live[entry.served_model_name] = live.get(entry.served_model_name, 0) + count
    if ready and not any(live.values()):
        ready, reason = False, "expected at least one worker whose blocks are known, got none; see /workers"
    return ReadyAnswer(ready, reason, live, fleet.index.stats())
