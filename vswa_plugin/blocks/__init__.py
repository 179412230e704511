"""What a block of KV cache is, how it is named, and what can be resumed from blocks. Pure."""
