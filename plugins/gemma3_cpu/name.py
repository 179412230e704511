"""The name of the engine, for its plugin and for what it says of itself."""

NAME = "gemma3_cpu"
