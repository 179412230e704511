"""The first line of an engine trace: what a reader must know of the engine's cache. Pure."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from vswa_plugin.blocks.layout import CHUNKED, FULL, RECURRENT, SLIDING, CacheGroup, CacheLayout, Resumption
from vswa_plugin.errors import ConfigError

#: Event format -> the reuse rule of its engine, unless the trace or the user names another.
DEFAULT_RULES = {"trtllm": "trtllm_v2", "vllm": "vllm"}
#: The rule in place of ``vllm`` where a layout is not plain.
HYBRID_RULE = "vllm_hybrid"

#: Numbers of tokens, of requests and of ids: far more than any trace has, and no fault anywhere.
Natural: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
Positive: TypeAlias = Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
#: No model has so many, and they are listed one by one.
MAX_GROUPS = 4_096

_KINDS = {"full": FULL, "swa": SLIDING, "chunked": CHUNKED, "mamba": RECURRENT}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class TraceGroup(msgspec.Struct, frozen=True, omit_defaults=True):
    """``count`` cache groups after one another.

    :param kind: ``full`` attention, ``swa`` with a window, ``chunked`` with a chunk, ``mamba`` for recurrent
        state; of any other nothing is assumed.
    :param window: in tokens, and so is ``chunk``.
    :param block_size: tokens per block; None: the header's.
    :param cacheable: False: never stored, so that it takes no part; its block size counts for the alignment.
    :param drop: the engine gives up the last block that it finds in it.
    """

    kind: str
    window: Positive | None = None
    count: Annotated[int, msgspec.Meta(gt=0, le=MAX_GROUPS)] = 1
    block_size: Positive | None = None
    chunk: Positive | None = None
    cacheable: bool = True
    drop: bool = False


class TraceLookahead(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the engine speculates.

    :param hash_tokens: so many tokens after a block are part of its hash.
    :param peek_limit: where a block ends, at the latest, that a group gives up: ``num_tokens``, rounded down
        to the hash block size; or ``num_tokens-1``.
    """

    hash_tokens: Natural = 0
    peek_limit: Literal["num_tokens", "num_tokens-1"] = "num_tokens"


class TraceHeader(msgspec.Struct, frozen=True, tag="header", omit_defaults=True):
    """First line of a trace. One of ``block_size`` and ``tokens_per_block``; ``groups``, or TensorRT-LLM's
    ``layers`` and ``max_attention_window``. Other fields are ignored.

    :param format: of the events, e.g. ``trtllm`` or ``vllm``, as ``vswa_event_adapter`` gets it.
    :param groups: in the order of their ids.
    :param rule: reuse rule of the engine, where it is not the format's usual one.
    :param config: for people: the model, or all that was set; of an object `blocks` is read.
    :param layers: ``swa`` or ``global``, layer by layer.
    :param alignment: every reused prefix is a multiple of so many tokens; None: the least common multiple of
        all block sizes.
    :param hash_block_size: tokens in whose multiples prompts are hashed; None: the greatest common divisor.
    :param partial_hits: prefixes may end inside blocks.
    :param replay_tokens: a prefix of no more tokens is not reused.
    """

    format: str
    block_size: Positive | None = None
    tokens_per_block: Positive | None = None
    groups: tuple[TraceGroup, ...] = ()
    rule: str | None = None
    engine: str = ""
    config: str | dict[str, Any] = ""
    layers: tuple[Literal["swa", "global"], ...] = ()
    max_attention_window: Positive | None = None
    alignment: Positive | None = None
    hash_block_size: Positive | None = None
    partial_hits: bool = False
    lookahead: TraceLookahead | None = None
    replay_tokens: Natural = 0

    @property
    def blocks(self) -> int | None:
        """Blocks of the engine's cache, where :attr:`config`, an object or the text of one, says it."""
        config: object = self.config
        if isinstance(config, str):
            try:
                config = msgspec.json.decode(config)
            except msgspec.DecodeError:
                return None
        blocks = config.get("blocks") if isinstance(config, dict) else None
        return blocks if isinstance(blocks, int) and not isinstance(blocks, bool) and blocks > 1 else None

    @property
    def model(self) -> str:
        """:attr:`config` as text."""
        return self.config if isinstance(self.config, str) else msgspec.json.encode(self.config).decode()


def layout_of(header: TraceHeader, rule: str | None, model: str) -> CacheLayout:
    """The cache groups that ``header`` declares.

    :param rule: in place of the header's.
    :param model: where the header names none.
    :raises ConfigError: the header does not say them, or no rule is known for the format.
    """
    chosen = rule or header.rule or DEFAULT_RULES.get(header.format)
    if chosen is None:
        raise ConfigError(
            f"no reuse rule is known for events of the format {header.format!r}; name one "
            "with --rule, or with `rule` in the header"
        )
    groups = _groups(header)
    if not any(cacheable for _, cacheable in groups):
        raise ConfigError(
            "line 1: expected block_size (or tokens_per_block) and groups, a list of "
            '{"kind": "full"} and {"kind": "swa", "window": tokens} in the order of their ids'
        )
    resumption = _resumption(header, [group for group, _ in groups])
    layout = CacheLayout(
        tuple(group for group, cacheable in groups if cacheable), chosen, header.model or model
    )
    if resumption != Resumption(layout.block_size, layout.hash_block_size):
        layout = msgspec.structs.replace(layout, resumption=resumption)
    if chosen == DEFAULT_RULES["vllm"] and not (rule or header.rule or layout.plain):
        layout = msgspec.structs.replace(layout, rule=HYBRID_RULE)
    try:
        return layout.check()
    except ConfigError as error:
        raise ConfigError(f"line 1: {error}") from error


def header_of(event_format: str, layout: CacheLayout, engine: str, config: str) -> TraceHeader:
    """The header of a trace of an engine with that layout; groups that take no part are not told apart."""
    groups: list[TraceGroup] = []
    for group_id in range(max(group.group_id for group in layout.groups) + 1):
        group = next((each for each in layout.groups if each.group_id == group_id), None)
        if group is None:
            groups.append(TraceGroup("full", block_size=layout.block_size, cacheable=False))
            continue
        groups.append(
            TraceGroup(
                _NAMES.get(group.kind, group.kind),
                group.window_size,
                block_size=None if group.block_size == layout.block_size else group.block_size,
                chunk=group.chunk_size,
                drop=group.drops_last,
            )
        )
    header = TraceHeader(
        event_format, layout.block_size, groups=tuple(groups), rule=layout.rule, engine=engine, config=config
    )
    where = layout.resumption
    if where is None:
        return header
    limit: Literal["num_tokens", "num_tokens-1"] = "num_tokens-1" if where.spare_last else "num_tokens"
    return msgspec.structs.replace(
        header,
        alignment=where.alignment,
        hash_block_size=where.hash_block_size,
        partial_hits=where.partial,
        lookahead=TraceLookahead(where.lookahead, limit) if where.lookahead or where.spare_last else None,
        replay_tokens=where.least_tokens,
    )


def _groups(header: TraceHeader) -> list[tuple[CacheGroup, bool]]:
    """All groups by id, and whether each is cacheable. Empty: the header does not say."""
    block_size = header.block_size or header.tokens_per_block
    stated = list(header.groups)
    if not stated and (header.max_attention_window or "swa" not in header.layers):
        windows = (header.max_attention_window if k == "swa" else None for k in dict.fromkeys(header.layers))
        stated = [TraceGroup("full" if w is None else "swa", w) for w in windows]
    groups: list[tuple[CacheGroup, bool]] = []
    for each in stated:
        _check_kind(each)
        size = each.block_size or block_size
        if size is None:
            return []
        kind = _KINDS.get(each.kind, each.kind)
        stated_kind = None if kind in (FULL, SLIDING) else kind
        if len(groups) + each.count > MAX_GROUPS:
            raise ConfigError(f"line 1, groups: expected at most {MAX_GROUPS} groups, got more")
        groups += [
            (CacheGroup(n, each.window, size, stated_kind, each.chunk, each.drop), each.cacheable)
            for n in range(len(groups), len(groups) + each.count)
        ]
    return groups


def _check_kind(group: TraceGroup) -> None:
    known = group.kind in _KINDS
    if known and (group.kind == "swa") != (group.window is not None):
        shown = msgspec.json.encode(group).decode()
        raise ConfigError(f"line 1, groups: expected a window for swa and none for {_others()}, got {shown}")
    if known and (group.kind == "chunked") != (group.chunk is not None):
        shown = msgspec.json.encode(group).decode()
        raise ConfigError(f"line 1, groups: expected a chunk for chunked and for no other kind, got {shown}")


def _others() -> str:
    return ", ".join(kind for kind in _KINDS if kind != "swa")


def _resumption(header: TraceHeader, groups: list[CacheGroup]) -> Resumption:
    unit = header.hash_block_size or math.gcd(*(group.block_size for group in groups))
    whole = math.lcm(*(group.block_size for group in groups))
    lookahead = header.lookahead or TraceLookahead()
    return Resumption(
        header.alignment or (unit if header.partial_hits else whole),
        unit,
        header.partial_hits,
        lookahead.hash_tokens,
        lookahead.peek_limit == "num_tokens-1",
        header.replay_tokens,
    )
