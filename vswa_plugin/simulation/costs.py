"""How long a simulated rank computes. Pure.

The defaults are calibrated on what NVIDIA publishes in its "NIM for LLMs benchmarking guide", 1.0.0, page
"Performance": Llama 3.3 70B in fp8 on two H100 (80 GB), NIM 1.8.0, one request at a time. First token after
47.77 ms for 500 prompt tokens and 406.77 ms for 5,000; then 18.91 and 18.58 ms a token. Two lengths do not
tell the pairs from the tokens, so ``per_pair_s`` is a choice: 6 of those 407 ms.
"""

from __future__ import annotations

import math

import msgspec

from vswa_plugin.errors import ConfigError


class CostModel(msgspec.Struct, frozen=True):
    """Seconds of one request on one rank::

        prefill = fixed_s + per_token_s * computed + per_pair_s * pairs
        decode  = per_output_token_s * (output tokens - 1)

    ``computed`` prompt tokens each attend to all tokens before them, which makes the ``pairs``. Sliding
    layers attend to a bounded number and belong to ``per_token_s``.
    """

    fixed_s: float = 0.0085
    per_token_s: float = 78.4e-6
    per_pair_s: float = 0.5e-9
    per_output_token_s: float = 0.0187

    def check(self) -> CostModel:
        """Return self, or raise :class:`ConfigError` that names the number."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"cost model, {name}: expected a finite number, 0 or more, got {value}")
        return self

    def prefill_s(self, prompt_len: int, cached_tokens: int) -> float:
        """From the start of the prompt to its first token."""
        computed = prompt_len - cached_tokens
        pairs = computed * cached_tokens + computed * (computed + 1) / 2
        return self.fixed_s + self.per_token_s * computed + self.per_pair_s * pairs

    def decode_s(self, output_len: int) -> float:
        """From the first token to the last."""
        return self.per_output_token_s * (output_len - 1)
