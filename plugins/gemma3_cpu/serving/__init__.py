"""The engine: requests, scheduling, ranks with their pools, prefill and decode."""
