"""The name of the engine, for its plugin and for its :class:`EngineInfo`."""

NAME = "gemma3_cpu"
