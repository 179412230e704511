"""Helpers for tests of vLLM's simulated cache: recorded traces, layouts, and what events add up to."""

from __future__ import annotations

import json
import lzma
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vswa_plugins.vllm_cache.manager import CacheManager, Options
from vswa_plugins.vllm_cache.names import Names

from tests.accuracy_helpers import DATA
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.reuse import RULES, resumable

HYBRID = DATA / "hybrid"
_KINDS = {"full": "full", "swa": "sliding", "chunked": "chunked", "mamba": "recurrent"}


class Recorded(NamedTuple):
    """One request of a trace, and the engine's events from its match to its end."""

    request: dict[str, Any]
    events: list[dict[str, Any]]


def trace_named(name: str) -> Path:
    (path,) = HYBRID.glob(f"vllm-hybrid-{name}.seq.*.jsonl.xz")
    return path


def recorded(path: Path) -> tuple[dict[str, Any], list[Recorded]]:
    """The header of a trace and its requests."""
    with lzma.open(path, "rt") as lines:
        header, *rest = map(json.loads, lines)
    requests: list[Recorded] = []
    for line in rest:
        if line["type"] == "request":
            requests.append(Recorded(line, []))
        else:
            requests[-1].events.append(line["event"])
    return header, requests


def manager_of(header: dict[str, Any]) -> CacheManager:
    """An empty cache like the recorded one; vLLM's number of blocks counts one that is never used."""
    lookahead = header.get("lookahead", {})
    groups, spec_kinds = [], {}
    for stated in header["groups"]:
        for _ in range(stated.get("count", 1)):
            spec_kinds[len(groups)] = stated["spec_kind"]
            groups.append(
                CacheGroup(
                    len(groups),
                    stated.get("window"),
                    stated["block_size"],
                    _KINDS[stated["kind"]],
                    stated.get("chunk"),
                    stated.get("drop", False),
                )
            )
    where = Resumption(
        header["alignment"],
        header["hash_block_size"],
        lookahead=lookahead.get("hash_tokens", 0),
        spare_last=lookahead.get("peek_limit") == "num_tokens-1",
    )
    options = Options(
        chunk_tokens=header["scheduler"]["max_num_batched_tokens"],
        drafts=lookahead.get("draft_tokens", 0),
        retention=header["retention"],
        spec_kinds=spec_kinds,
    )
    layout = CacheLayout(tuple(groups), "vllm_hybrid", "m", resumption=where)
    return CacheManager(layout, header["num_blocks"] - 1, options)


def answer_of(one: Recorded, layout: CacheLayout) -> list[int]:
    """The tokens that were generated, as far as events show them; those that are in no block are 0 here."""
    tokens = list(one.request["token_ids"])
    end = len(tokens) + one.request["output_len"]
    stored = [event for event in one.events if event["type"] == "BlockStored"]
    grown = 0
    while grown < len(tokens):
        grown = len(tokens)
        names = Names(layout.hash_block_size, layout.lookahead)
        names.extend(tokens)
        ends = {name: at * layout.hash_block_size for at, name in enumerate(names.published, 1)}
        for event in stored:
            start = 0 if event["parent_block_hash"] is None else ends.get(event["parent_block_hash"])
            ahead = event.get("lookahead_token_ids") or [[]]
            if start is not None:
                tokens[start:] = max(tokens[start:], [*event["token_ids"], *ahead[-1]], key=len)
    prompt_len = len(one.request["token_ids"])
    return [*tokens[prompt_len:end], *[0] * (end - len(tokens))]


class Held:
    """What the events of a cache add up to: copies by group and name."""

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        self.copies: dict[int, Counter[int]] = {group.group_id: Counter() for group in layout.groups}

    def apply(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            if event["type"] == "AllBlocksCleared":
                for copies in self.copies.values():
                    copies.clear()
                continue
            copies = self.copies[event["group_idx"]]
            for name in event["block_hashes"]:
                copies[name] += 1 if event["type"] == "BlockStored" else -1
                assert copies[name] >= 0, "nothing is removed that is not there"

    def resumable(self, prompt: Sequence[int]) -> int:
        """By the reuse rule of the layout, boundary by boundary."""
        return self.resumable_of(self.layout, prompt)

    def resumable_of(self, layout: CacheLayout, prompt: Sequence[int]) -> int:
        """The same where only the groups of ``layout`` count, some of all."""
        names = Names(layout.hash_block_size, layout.lookahead)
        names.extend(prompt)
        held = {
            group.group_id: [self.copies[group.group_id][name] > 0 for name in names.published]
            for group in layout.groups
        }
        return resumable(RULES[layout.rule], layout, held, len(prompt))


def entries_of(manager: CacheManager) -> Iterator[tuple[int, int, int]]:
    """Group, name and copies of all that lookups can find."""
    for entry, blocks in manager.pool.entries.items():
        yield entry.group_id, entry.name, len(blocks)
