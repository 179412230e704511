"""From the options to a running ``AsyncLLM``, and what is compared before it serves."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import msgspec

from vswa_plugin.blocks import VLLM, Memory, Pool
from vswa_plugin.engine import EngineInfo, is_number
from vswa_plugin.errors import ConfigError, Unavailable, shown

from .numbers import TransferNumbers, stat_logger
from .options import VllmOptions
from .package import Api, one_line
from .side_channel import side_channel
from .sockets import Sockets, private_sockets
from .transfer import CONNECTORS

logger = logging.getLogger(__name__)


def event_sockets(options: VllmOptions, directory: str) -> Sockets:
    """Where events are published: as the user says, else in ``directory``.

    :raises ConfigError: its name is too long.
    """
    private = private_sockets(directory)
    addresses: dict[str, str] = {} if private is None else private._asdict()
    addresses |= {name: options.events[name] for name in Sockets._fields if name in options.events}
    if len(addresses) < len(Sockets._fields):
        raise ConfigError(
            f"TMPDIR: expected a directory with a short name for the engine's sockets, got {directory}; "
            "set it to another one, or write endpoint and replay_endpoint in kv_events_config"
        )
    return Sockets(**addresses)


def launch(
    api: Api,
    model_path: str,
    options: VllmOptions,
    sockets: Sockets,
    groups: int,
    numbers: TransferNumbers | None,
) -> Any:
    """A running ``AsyncLLM``; takes minutes.

    :param groups: cache groups that were declared.
    :param numbers: where to count what is handed over; None: nothing is.
    :raises ConfigError: vLLM does not take the options, or would not keep so many groups with them.
    :raises Unavailable: its processes have ended while they started.
    """
    loggers = None if numbers is None else [stat_logger(api.StatLoggerBase, numbers)]
    try:
        arguments = dict(options.engine_args)
        if options.transfer is not None:
            arguments["kv_transfer_config"] = _transfer(api, options, groups)
        args = api.AsyncEngineArgs(
            model=model_path,
            kv_events_config=api.KVEventsConfig(**{**options.events, **sockets._asdict()}),
            **arguments,
        )
        with contextlib.nullcontext() if numbers is None else side_channel(options.ranks):
            return api.AsyncLLM.from_engine_args(args, stat_loggers=loggers)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        reason = one_line(error)
        raise ConfigError(f"vLLM does not take these options: {reason} (in {options.source})") from error
    except RuntimeError as error:
        reason = one_line(error)
        raise Unavailable(f"vLLM has not started: {reason} Its log above says why.") from error


def _transfer(api: Api, options: VllmOptions, groups: int) -> Any:
    """vLLM's ``KVTransferConfig``.

    :raises ConfigError: with its connector vLLM keeps one cache group, and several were declared.
    """
    made = api.KVTransferConfig(**(options.transfer or {}))
    if groups > 1 and not api.KVConnectorFactory.supports_hma_config(made):
        raise ConfigError(
            f"kv_transfer_config.kv_connector: expected one that can keep {groups} cache groups, such as "
            f"{CONNECTORS[0]}, got {shown(made.kv_connector)}, for which vLLM turns its hybrid KV cache "
            "manager off; to serve the model with one group, write disable_hybrid_kv_cache_manager: true "
            f"(in {options.source})"
        )
    return made


def compared(info: EngineInfo, config: Any, options: VllmOptions) -> EngineInfo:
    """``info`` with what the engine has made of the options.

    :param config: the engine's ``VllmConfig``.
    :raises ConfigError: its cache differs from the layout that was declared.
    """
    layout, source = info.layout, options.source
    cache, scheduler = config.cache_config, config.scheduler_config
    smallest = min(group.block_size for group in layout.groups)
    if cache.block_size != smallest:
        raise ConfigError(
            f"block_size: expected {cache.block_size}, which vLLM chose for this model and machine, got "
            f"{smallest}; write block_size: {cache.block_size} (in {source})"
        )
    if len(layout.groups) > 1 and scheduler.disable_hybrid_kv_cache_manager:
        raise ConfigError(
            f"expected vLLM to keep {len(layout.groups)} cache groups, but it has turned its hybrid KV cache "
            "manager off; its log says why. To serve the model with one group, write "
            f"disable_hybrid_kv_cache_manager: true (in {source})"
        )
    blocks = cache.num_gpu_blocks
    known = is_number(blocks) and blocks > 1
    groups = tuple(group.group_id for group in layout.groups)
    made = msgspec.structs.replace(
        info,
        context_length=int(config.model_config.max_model_len),
        max_num_seqs=int(scheduler.max_num_seqs),
        max_num_batched_tokens=int(scheduler.max_num_batched_tokens),
        total_kv_blocks=int(blocks) if is_number(blocks) and blocks else info.total_kv_blocks,
        memory=Memory(
            # One of its blocks is never used.
            (Pool(groups, int(blocks) - 1 if known else None),),
            VLLM,
            int(scheduler.max_num_batched_tokens),
            int(scheduler.max_num_seqs),
        ),
    )
    logger.info(
        "vLLM %s: %d blocks of %d tokens, %d cache groups, %d ranks, asynchronous scheduling %s",
        info.engine_version,
        made.total_kv_blocks,
        layout.block_size,
        len(layout.groups),
        info.data_parallel_size,
        "on" if scheduler.async_scheduling else "off",
    )
    return made
