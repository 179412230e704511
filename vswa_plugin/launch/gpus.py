"""Which worker gets which GPUs: a set of its own for each, as many as its parallel sizes need. Pure.

The guide's variables name the GPUs of each kind of worker. For a kind without one they come from
CUDA_VISIBLE_DEVICES, else from the machine, those that no other kind has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from vswa_plugin.engine.gpus import VISIBLE_ENV, listed_gpus, names_gpu, visible_gpus
from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.launch.topologies import WorkerGroup

#: Mode -> the guide's variable. That of aggregated workers is CUDA's own.
GPU_ENV = {"prefill": f"PREFILL_{VISIBLE_ENV}", "decode": f"DECODE_{VISIBLE_ENV}", "agg": VISIBLE_ENV}
_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "data_parallel_size")


def gpus_needed(options: Mapping[str, Any]) -> int:
    """How many GPUs one worker with these engine options needs; what is no size is the engine's to refuse."""
    sizes = (options.get(name) for name in _SIZES)
    return math.prod(size for size in sizes if isinstance(size, int) and size > 0)


def with_gpus(
    groups: Sequence[WorkerGroup],
    needs: Sequence[int],
    environ: Mapping[str, str],
    say: Callable[[str], None],
) -> tuple[WorkerGroup, ...]:
    """``groups``, in which each worker has its own GPUs, where there are any.

    :param needs: of each group, how many one worker needs.
    :param say: where the machine's GPUs do not suffice, and no variable asks for them.
    :raises ConfigError: a variable names fewer than its workers need, one twice, or, of the guide's, none.
    """
    named = {group.mode: _named(group.mode, environ) for group in groups}
    taken = {gpu for gpus in named.values() for gpu in gpus or ()}
    free = [gpu for gpu in _different(VISIBLE_ENV, visible_gpus(environ)) if gpu not in taken]
    made = []
    for group, need in zip(groups, needs, strict=True):
        gpus, wanted = named[group.mode], group.count * need
        if gpus is None:
            variable, gpus = VISIBLE_ENV, tuple(free[:wanted])
            del free[:wanted]
        else:
            variable = GPU_ENV[group.mode]
        if len(gpus) < wanted:
            short = (
                f"expected {wanted} GPUs, {need} for each of {group.count} {group.mode} workers (the product "
                f"of their parallel sizes), got {len(gpus)}"
            )
            if environ.get(variable) and gpus:
                raise ConfigError(
                    f"{variable}: {short}: {environ[variable]}; name more, start fewer workers, or unset it "
                    "for an engine on the CPU"
                )
            if gpus:
                say(f"{short} on this machine; all of these workers see all of them")
            made.append(group)
            continue
        sets = tuple(",".join(gpus[at : at + need]) for at in range(0, wanted, need))
        made.append(msgspec.structs.replace(group, gpus=sets))
    return tuple(made)


def _named(mode: str, environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """What the guide's variable names; None where it is not set."""
    variable = GPU_ENV[mode]
    if not environ.get(variable) or variable == VISIBLE_ENV:
        return None
    gpus = listed_gpus(environ[variable])
    if not gpus or not all(map(names_gpu, gpus)):
        raise ConfigError(
            f"{variable}: expected numbers or UUIDs of GPUs with commas between them, got "
            f"{shown(environ[variable])}; unset it for an engine on the CPU"
        )
    return _different(variable, gpus)


def _different(variable: str, gpus: Sequence[str]) -> tuple[str, ...]:
    """``gpus``; raises ConfigError where one is there twice: CUDA would show none at all."""
    if len(set(gpus)) < len(gpus):
        raise ConfigError(f"{variable}: expected different GPUs, got {', '.join(gpus)}")
    return tuple(gpus)
