"""What a block of KV cache is, how it is named, and what can be resumed from blocks. Pure.

layout.py    CacheGroup and CacheLayout: the windows of a model, and the size of their blocks
hashing.py   block and sequence hashes, equal to Dynamo's
kernel.py    the compiled kernel, where one was built
reuse.py     the rules by which engines resume a prompt
"""

from vswa_plugin.blocks.hashing import block_hashes, sequence_hashes, sequence_hashes_of_tokens
from vswa_plugin.blocks.layout import HASH_SCHEME, CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import RULES, Held, Needs, ReuseRule, resumable, rule_named

__all__ = [
    "HASH_SCHEME",
    "RULES",
    "CacheGroup",
    "CacheLayout",
    "Held",
    "Needs",
    "ReuseRule",
    "block_hashes",
    "resumable",
    "rule_named",
    "sequence_hashes",
    "sequence_hashes_of_tokens",
]
