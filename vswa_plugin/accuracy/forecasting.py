"""What a prompt will find when its turn comes, as a scorer: our router's promise. No I/O."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.memory import VLLM, Memory, Pool
from vswa_plugin.blocks.reuse import RULES, ReuseRule
from vswa_plugin.engine.contract import BlocksStored, Node
from vswa_plugin.engine.predicted import Prompt
from vswa_plugin.forecast import RankMemory, Shape
from vswa_plugin.wire.events import Event

__all__ = ["FORECAST", "Forecasting"]

FORECAST = "forecast"


class Forecasting:
    """Every group apart, by the engine's own rule, when the requests before this one have had their turn.

    :param blocks: of the engine's cache, as vLLM counts them: all groups take from one pool, and one block is
        never used; None: learnt from the events.
    """

    name = FORECAST

    def __init__(self, rules: Mapping[str, ReuseRule] = RULES, blocks: int | None = None) -> None:
        self._rules = rules
        self._blocks = blocks
        self._memory: RankMemory | None = None

    def begin(self, layout: CacheLayout) -> None:
        before = self._memory
        shape = Shape(layout, None, self._rules)
        if self._blocks is not None and shape.eviction == VLLM:
            groups = tuple(group.group_id for group in layout.groups)
            shape = Shape(layout, Memory((Pool(groups, self._blocks - 1),)), self._rules)
        self._memory = RankMemory(shape)
        for request in before.under_way() if before is not None else ():
            self._memory.sent(request.key, request.names, request.prompt_len, reads_cache=request.reads_cache)

    def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        """Do nothing: blocks are known by their sequence hashes."""

    def apply(self, event: Event) -> None:
        self._known.apply(event)

    def predict(self, prompt: Prompt) -> int:
        return self._known.forecast(prompt.sequence_hashes, len(prompt.token_ids)).cached_tokens

    def sent(self, key: Hashable, prompt: Prompt, reads_cache: bool) -> None:
        """The prompt that was predicted waits from now on."""
        self._known.sent(key, prompt.sequence_hashes, len(prompt.token_ids), reads_cache=reads_cache)

    def admitted(self, key: Hashable, cached_tokens: int) -> None:
        """The engine has matched it."""
        self._known.admitted(key, cached_tokens)

    def ended(self, key: Hashable) -> None:
        """It is over."""
        self._known.ended(key)

    @property
    def _known(self) -> RankMemory:
        assert self._memory is not None, "begin comes first"
        return self._memory
