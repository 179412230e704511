"""What a stock Dynamo router would promise of one rank: the boundary projection, in Dynamo's own tree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import count
from typing import cast

from vswa_plugin.blocks import CacheLayout, ReuseRule, rule_named
from vswa_plugin.engine import BlocksStored, Node, Prompt
from vswa_plugin.wire import Event, layout_event

from .projection import Projection
from .units import unit_hashes

_WORKER_ID, _DP_RANK = 1, 0


class BoundaryProjection:
    """A scorer for ``vswa accuracy``: the projection, and the engine's last-token rule.

    :raises ConfigError: the rule of ``layout`` cannot be projected.
    """

    name = "boundary projection"

    def __init__(self, layout: CacheLayout, rules: Mapping[str, ReuseRule]) -> None:
        from dynamo.llm import RadixTree

        self._rules = rules
        self._layout = layout
        self._projection = Projection("boundary", layout, rules, hasher=unit_hashes)
        self._tree = RadixTree()
        self._ids = count(1)

    def begin(self, layout: CacheLayout) -> None:
        self._layout = layout
        self._projection.apply(layout_event(layout))

    def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        self._projection.learn(stored, nodes)

    def apply(self, event: Event) -> None:
        self._projection.apply(event)

    def predict(self, prompt: Prompt) -> int:
        self._tell()
        stride = self._layout.block_size // self._layout.hash_block_size
        names = list(prompt.sequence_hashes[stride - 1 :: stride])
        # Dynamo's type stub says worker id -> blocks; the keys that it returns are worker id and dp rank.
        scores = self._tree.find_matches(names).scores
        matched = cast("dict[tuple[int, int], int]", scores).get((_WORKER_ID, _DP_RANK), 0)
        rule, prompt_len = rule_named(self._layout.rule, self._rules), len(prompt.token_ids)
        boundary = min(matched, rule.boundaries(self._layout, prompt_len))
        return rule.tokens(self._layout, boundary, prompt_len)

    def _tell(self) -> None:
        changes = self._projection.changes()
        if changes.removed:
            self._apply({"removed": {"block_hashes": [block.sequence_hash for block in changes.removed]}})
        for run in changes.stored:
            names = [block.sequence_hash for block in run.blocks]
            # Dynamo walks by block hashes, but along one path a block's sequence hash tells it apart as well.
            blocks = [{"block_hash": name, "tokens_hash": name} for name in names]
            parent_hash = None if run.parent is None else run.parent.sequence_hash
            self._apply({"stored": {"parent_hash": parent_hash, "blocks": blocks}})
        self._projection.commit(changes)

    def _apply(self, data: dict[str, object]) -> None:
        event = {"event_id": next(self._ids), "dp_rank": _DP_RANK, "data": data}
        self._tree.apply_event(_WORKER_ID, json.dumps(event).encode())
