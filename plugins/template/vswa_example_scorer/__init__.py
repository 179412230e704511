"""A scorer for `vswa accuracy replay`: promises a prompt's unbroken start in one chosen cache group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vswa_plugin.blocks import CacheLayout, ReuseRule
from vswa_plugin.engine import BlocksStored, Node, Prompt, Scorer
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.wire import Cleared, Event, Removed, Stored


class ExampleScorer:
    """Knows the blocks of the narrowest window, and promises what it holds of a prompt without a hole."""

    name = "example"

    def __init__(self) -> None:
        self._group_id = 0
        self._block_size = 1
        self._held: set[int] = set()

    def begin(self, layout: CacheLayout) -> None:
        """Nothing is held: the engine starts, or starts again."""
        narrowest = min(layout.groups, key=lambda group: group.window_size or 1 << 62)
        self._group_id, self._block_size = narrowest.group_id, layout.block_size
        self._held = set()

    def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        """Tokens of stored blocks, for scorers that need more than the names."""

    def apply(self, event: Event) -> None:
        if isinstance(event, Stored) and event.group_id == self._group_id:
            self._held.update(event.sequence_hashes)
        elif isinstance(event, Removed) and event.group_id == self._group_id:
            self._held.difference_update(event.sequence_hashes)
        elif isinstance(event, Cleared) and event.group_id in (None, self._group_id):
            self._held.clear()

    def predict(self, prompt: Prompt) -> int:
        names = prompt.sequence_hashes
        blocks = next((at for at, name in enumerate(names) if name not in self._held), len(names))
        return max(0, min(blocks * self._block_size, len(prompt.token_ids) - 1))


@hookimpl
def vswa_accuracy_scorers(layout: CacheLayout, rules: Mapping[str, ReuseRule]) -> Sequence[Scorer]:
    return [ExampleScorer()]
