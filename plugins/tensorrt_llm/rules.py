"""Which cache manager the engine will use, hence which reuse rule its prompts are resumed by. Pure.

TensorRT-LLM decides while it starts and does not report its choice. This follows its sources; which release
has which change is known by date only, and where that is open the rule that promises less is taken.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from vswa_plugin.errors import ConfigError, unknown_choice

from .options import TrtllmOptions
from .package import Version

V2, V1, V1_CONTIGUOUS = RULES = ("trtllm_v2", "trtllm_v1", "trtllm_v1_contiguous")

#: The first release candidate that is surely younger than the change to V1 (spring 2026).
V1_LOOKS_PAST_HOLES = Version(1, 3, 0, 20)
#: The first release candidate that is surely younger than V2 becoming Gemma's default (August 2026).
GEMMA_DEFAULTS_TO_V2 = Version(1, 3, 0, 29)
#: From here on V2 takes the windows from the model where no max_attention_window is given.
DERIVES_WINDOWS = Version(1, 4, 0, 0)
#: Before this line V2 surely refuses to start with an event buffer (it can give events since spring 2026).
V2_GIVES_EVENTS = Version(1, 3, 0, 0)

_PREFER_V2 = ("Gemma3ForCausalLM", "Gemma4", "GptOss")
#: Environment variables that make of the transceiver DEFAULT another one than NIXL.
_NOT_NIXL = ("TRTLLM_USE_UCX_KVCACHE", "TRTLLM_USE_MOONCAKE_KVCACHE", "TRTLLM_USE_MPI_KVCACHE")


class Decision(NamedTuple):
    """:param manager: ``V1`` or ``V2``.
    :param reasons: for the log, first to last.
    """

    rule: str
    manager: str
    reasons: tuple[str, ...]


def decide(
    options: TrtllmOptions,
    version: Version | None,
    architecture: str,
    env: Mapping[str, str] = os.environ,
) -> Decision:
    """The rule for these options.

    :param version: None: unknown, taken as the newest.
    :raises ConfigError: an unknown rule, or a manager that cannot hand over blocks as configured.
    """
    v2, reasons = _manager(options, version, architecture)
    if options.manager_v2 and version is not None and version < V2_GIVES_EVENTS:
        raise ConfigError(
            f"kv_cache_config.use_kv_cache_manager_v2: expected false or 'auto' with TensorRT-LLM {version}, "
            f"whose manager V2 gives no KV events, got true (in {options.source})"
        )
    blocked = _transceiver_needs_v1(options, version, env)
    if v2 and blocked:
        if options.manager_v2:
            raise ConfigError(
                f"kv_cache_config.use_kv_cache_manager_v2: expected false or 'auto', got true: {blocked} (in "
                f"{options.source}); set backend: NIXL and transceiver_runtime: PYTHON"
            )
        v2 = False
        reasons.append(blocked)
    manager = "V2" if v2 else "V1"
    if v2:
        rule = V2
    elif version is not None and version < V1_LOOKS_PAST_HOLES:
        rule = V1_CONTIGUOUS
        reasons.append(f"before {V1_LOOKS_PAST_HOLES} V1 may need every window from block 0")
    else:
        rule = V1
    if options.reuse_rule is not None:
        if options.reuse_rule not in RULES:
            raise ConfigError(
                f"vswa.reuse_rule: {unknown_choice('rule', options.reuse_rule, RULES)} (in {options.source})"
            )
        reasons.append(f"{rule} would follow from this; vswa.reuse_rule says {options.reuse_rule}")
        rule = options.reuse_rule
    return Decision(rule, manager, tuple(reasons))


def _manager(options: TrtllmOptions, version: Version | None, architecture: str) -> tuple[bool, list[str]]:
    if options.manager_v2 is not None:
        return options.manager_v2, [f"use_kv_cache_manager_v2 is {str(options.manager_v2).lower()}"]
    shown = "of unknown version, taken as the newest" if version is None else str(version)
    if not architecture.startswith(_PREFER_V2):
        return False, [f"{architecture or 'this model'} does not ask for V2, as far as is known"]
    if version is not None and version < GEMMA_DEFAULTS_TO_V2:
        return False, [
            f"TensorRT-LLM {shown}: V2 is surely the default of {architecture} from {GEMMA_DEFAULTS_TO_V2}"
        ]
    return True, [f"TensorRT-LLM {shown}: V2 is the default of {architecture}"]


def _transceiver_needs_v1(
    options: TrtllmOptions, version: Version | None, env: Mapping[str, str]
) -> str | None:
    """Why blocks can be handed over by V1 only; None if V2 can, or if no blocks are handed over."""
    backend, runtime = options.transceiver_backend, options.transceiver_runtime
    if backend is None:
        return None
    other = next((name for name in _NOT_NIXL if env.get(name) == "1"), None)
    if backend == "DEFAULT" and other:
        return f"{other}=1 makes the cache transceiver another one than NIXL"
    if backend not in ("NIXL", "DEFAULT"):
        return f"the cache transceiver {backend} cannot hand over V2's blocks: that takes NIXL"
    # Not given means 'auto' today, which follows the model, and meant CPP before.
    if runtime == "CPP" or (runtime is None and version is not None and version < GEMMA_DEFAULTS_TO_V2):
        return f"the cache transceiver's runtime is {runtime or 'CPP'}: V2 needs PYTHON"
    return None
