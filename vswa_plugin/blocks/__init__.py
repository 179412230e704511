"""What a block of KV cache is, how it is named, and what can be resumed from blocks. Pure.

layout.py    CacheGroup and CacheLayout: the cache groups of a model, and the size of their blocks
hashing.py   block and sequence hashes, equal to Dynamo's, and the names of prefixes
kernel.py    the compiled kernel, where one was built
reuse.py     the rules by which engines resume a prompt
hybrid.py    the rule for groups of any kind and block size
memory.py    Memory and Pool: the sizes of a rank's pools, and the order in which it evicts
search.py    the same where only the engine's own search says what is reused
"""

from vswa_plugin.blocks.hashing import (
    block_hashes,
    prefix_names,
    sequence_hashes,
    sequence_hashes_of_tokens,
)
from vswa_plugin.blocks.hybrid import Need
from vswa_plugin.blocks.layout import (
    CHUNKED,
    FULL,
    HASH_SCHEME,
    RECURRENT,
    SLIDING,
    CacheGroup,
    CacheLayout,
    Naming,
    Resumption,
)
from vswa_plugin.blocks.memory import TRTLLM_V1, TRTLLM_V2, VLLM, Memory, Pool
from vswa_plugin.blocks.reuse import RULES, Held, HybridRule, Needs, ReuseRule, checked, resumable, rule_named

__all__ = [
    "CHUNKED",
    "FULL",
    "HASH_SCHEME",
    "RECURRENT",
    "RULES",
    "SLIDING",
    "TRTLLM_V1",
    "TRTLLM_V2",
    "VLLM",
    "CacheGroup",
    "CacheLayout",
    "Held",
    "HybridRule",
    "Memory",
    "Naming",
    "Need",
    "Needs",
    "Pool",
    "Resumption",
    "ReuseRule",
    "block_hashes",
    "checked",
    "prefix_names",
    "resumable",
    "rule_named",
    "sequence_hashes",
    "sequence_hashes_of_tokens",
]
