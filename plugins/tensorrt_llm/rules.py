"""Which cache manager the engine will use, hence which reuse rule its prompts are resumed by. Pure.

:mod:`.releases` holds the facts, release by release; here they meet the options of one worker.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from vswa_plugin.engine import Section
from vswa_plugin.errors import ConfigError, unknown_choice

from .options import TrtllmOptions
from .package import Version
from .releases import PREFER_V2, RUNTIME_DEFAULTS_TO_PYTHON, Handover, Manager, Release, release_of
from .values import check_transfer_buffer

V2, V1, V1_CONTIGUOUS = RULES = ("trtllm_v2", "trtllm_v1", "trtllm_v1_contiguous")

#: Environment variables that make of the transceiver DEFAULT another one than NIXL; before them goes
_NIXL = "TRTLLM_USE_NIXL_KVCACHE"
_NOT_NIXL = ("TRTLLM_USE_UCX_KVCACHE", "TRTLLM_USE_MOONCAKE_KVCACHE", "TRTLLM_USE_MPI_KVCACHE")
_MANAGER_OPTION = "kv_cache_config.use_kv_cache_manager_v2"
_RUNTIME_OPTION = "cache_transceiver_config.transceiver_runtime"


class Decision(NamedTuple):
    """What follows from release, model and options.

    :param manager: ``V1`` or ``V2``.
    :param reasons: for the log, first to last.
    :param derives_windows: whether the engine takes the windows from the model where none are given.
    :param runtime: what to set ``transceiver_runtime`` to, because the engine would not start; None: nothing.
    :param unknown_options: options that this release does not know, and that must not be passed to it.
    """

    rule: str
    manager: str
    reasons: tuple[str, ...]
    derives_windows: bool = False
    runtime: str | None = None
    unknown_options: tuple[str, ...] = ()


def decide(
    options: TrtllmOptions,
    version: Version | None,
    architecture: str,
    env: Mapping[str, str] = os.environ,
) -> Decision:
    """The manager and the rule for these options.

    :param version: None: unknown, taken as the newest.
    :raises ConfigError: an unknown rule, a manager that cannot hand over blocks as configured, or a transfer
        buffer that the transceiver of this release does not take.
    """
    release = release_of(version)
    shown = (
        "TensorRT-LLM of unknown version, taken as the newest"
        if version is None
        else f"TensorRT-LLM {version}"
    )
    handover, why_not_nixl = _handover(options, env)
    reasons: list[str] = []
    unknown = _unknown_options(options, release)
    if unknown:
        reasons.append(f"{shown} does not know {' and '.join(unknown)}")
    if _RUNTIME_OPTION in unknown:
        transceiver = Section(options.llm_args, options.source).section("cache_transceiver_config")
        check_transfer_buffer(transceiver, options.tokens_per_block)
    runtime = None
    if _needs_runtime(handover, release, version, architecture):
        runtime, handover = "CPP", Handover.CPP
    manager = release.manager(Handover.NIXL if _RUNTIME_OPTION in unknown else handover)
    if manager is Manager.NO_START and handover is Handover.OTHER_PYTHON:
        raise ConfigError(
            f"{_RUNTIME_OPTION}: expected CPP, or backend: NIXL, because PYTHON supports NIXL alone; got "
            f"{options.transceiver_runtime} with {why_not_nixl or options.transceiver_backend} "
            f"(in {options.source})"
        )
    requested = None if _MANAGER_OPTION in unknown else options.manager_v2
    if requested:
        _check_requested(options, release, handover, shown, why_not_nixl)
    prefers = architecture.startswith(PREFER_V2)
    is_v2 = requested if requested is not None else prefers and manager is Manager.V2
    reasons.append(_reason(requested, prefers, manager, shown, architecture, handover))
    rule = V2 if is_v2 else release.v1_rule
    if options.reuse_rule is not None:
        if options.reuse_rule not in RULES:
            raise ConfigError(
                f"vswa.reuse_rule: {unknown_choice('rule', options.reuse_rule, RULES)} (in {options.source})"
            )
        reasons.append(f"{rule} would follow from this, and vswa.reuse_rule is {options.reuse_rule}")
        rule = options.reuse_rule
    return Decision(
        rule, "V2" if is_v2 else "V1", tuple(reasons), release.derives_windows and is_v2, runtime, unknown
    )


def _handover(options: TrtllmOptions, env: Mapping[str, str]) -> tuple[Handover, str | None]:
    """How blocks are handed over, and what makes of DEFAULT another transceiver than NIXL."""
    backend, runtime = options.transceiver_backend, options.transceiver_runtime
    if backend is None:
        return Handover.NONE, None
    if runtime == "CPP":
        return Handover.CPP, None
    variable = next((name for name in (_NIXL, *_NOT_NIXL) if env.get(name) == "1"), _NIXL)
    is_nixl = backend == "NIXL" or (backend == "DEFAULT" and variable == _NIXL)
    python = runtime == "PYTHON"
    if is_nixl:
        return (Handover.NIXL_PYTHON if python else Handover.NIXL), None
    why = f"{variable}=1" if backend == "DEFAULT" else None
    return (Handover.OTHER_PYTHON if python else Handover.OTHER), why


def _unknown_options(options: TrtllmOptions, release: Release) -> tuple[str, ...]:
    if release.manager(Handover.CPP) is not Manager.NOT_AN_OPTION:
        return ()
    given = {_MANAGER_OPTION: options.manager_given, _RUNTIME_OPTION: options.transceiver_runtime is not None}
    return tuple(name for name, is_given in given.items() if is_given)


def _needs_runtime(handover: Handover, release: Release, version: Version | None, architecture: str) -> bool:
    """Whether the engine would take the runtime PYTHON, which the transceiver does not support."""
    for_all = version is None or version >= RUNTIME_DEFAULTS_TO_PYTHON
    follows = for_all or architecture.startswith(PREFER_V2)
    return handover is Handover.OTHER and follows and release.manager(handover) is Manager.NO_START


def _check_requested(
    options: TrtllmOptions, release: Release, handover: Handover, shown: str, why_not_nixl: str | None
) -> None:
    """Manager V2 is requested: it must give events, and hand over its blocks."""
    if not release.v2_events:
        raise ConfigError(
            f"{_MANAGER_OPTION}: expected false or 'auto' with {shown}, whose manager V2 gives no KV events, "
            f"got true (in {options.source})"
        )
    if release.manager(handover) in (Manager.V1, Manager.NO_START):
        blocked = why_not_nixl or f"the cache transceiver {options.transceiver_backend}"
        if handover is Handover.CPP:
            blocked = "the cache transceiver's runtime CPP"
        raise ConfigError(
            f"{_MANAGER_OPTION}: expected false or 'auto', got true: {blocked} cannot hand over V2's blocks "
            f"(in {options.source}); set backend: NIXL and transceiver_runtime: PYTHON"
        )


def _reason(
    requested: bool | None, prefers: bool, manager: Manager, shown: str, architecture: str, handover: Handover
) -> str:
    if requested is not None:
        return f"use_kv_cache_manager_v2 is {str(requested).lower()}"
    if not prefers:
        return f"{architecture or 'this model'} does not prefer V2, as far as is known"
    return f"{shown}: {architecture}, {handover}: {manager}"
