"""``vswa simulate --model``: the caches of known models, by whichever plugin simulates their engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import msgspec

from vswa_plugin.blocks import CacheGroup, CacheLayout
from vswa_plugin.engine import RankSetup, SimulatedRank
from vswa_plugin.engine.presets import TRTLLM, preset_named, rank_setup
from vswa_plugin.errors import ConfigError, InvalidRequest

from ..serving.options import is_number
from .requests import Totals, answer

#: What ``vswa simulate`` is given to simulate other engines' ranks.
NewRank: TypeAlias = Callable[[RankSetup], SimulatedRank]

#: Of every other cache group, as a share of the room for global attention.
_SHARE = 0.5
_KINDS = {"full": "full", "sliding": "swa", "chunked": "chunked", "recurrent": "mamba"}


class RankWorker:
    """A simulated rank that serves one request at a time."""

    def __init__(self, rank: SimulatedRank) -> None:
        self._rank = rank

    def serve(self, prompt: Sequence[int], output_len: int) -> int:
        if not self._rank.fits(len(prompt), output_len):
            raise InvalidRequest(
                f"{len(prompt)} prompt tokens and {output_len} to generate: expected a request that the "
                "cache can hold and --max-seq-len allows; raise --blocks"
            )
        sequence = self._rank.open(prompt, output_len)
        assert sequence is not None, "it fits, and it is alone"
        sequence.compute_prompt()
        sequence.finish(answer(prompt, output_len))
        return sequence.cached_tokens

    def take_events(self) -> list[dict[str, Any]]:
        return cast("list[dict[str, Any]]", list(self._rank.take_events()))


def windows_of(name: str) -> list[int | None] | None:
    """Window of each layer of a model that TensorRT-LLM serves; None: another engine does.

    :raises ConfigError: an unknown model.
    """
    preset = preset_named(name)
    if preset.engine != TRTLLM:
        return None
    return [shape.reach for shape in preset.shapes for _ in range(shape.layers)]


def setup_of(args: argparse.Namespace) -> RankSetup:
    """The cache of each worker.

    :raises ConfigError: an option that does not go with the model.
    """
    setup = rank_setup(args.model, _blocks(args.blocks), _SHARE, args.block_size, args.max_seq_len)
    return msgspec.structs.replace(setup, chunk_tokens=args.chunk or setup.chunk_tokens)


def _blocks(text: str) -> int:
    if not (is_number(text) and int(text)):
        raise ConfigError(f"--blocks: expected a number of at least 1 with --model, got {text!r}")
    return int(text)


def header_of(setup: RankSetup, workers: int) -> dict[str, Any]:
    """The header of an engine trace; docs/accuracy.md defines it."""
    layout = setup.layout
    return {
        "type": "header",
        "format": "vllm",
        "engine": "vllm, simulated",
        "config": layout.model,
        "rule": layout.rule,
        "block_size": layout.block_size,
        "groups": [_header_group(group, layout) for group in layout.groups],
        "alignment": layout.block_size,
        "hash_block_size": layout.hash_block_size,
        "retention": 0,
        "chunk_size": setup.chunk_tokens,
        "max_seq_len": setup.max_seq_len,
        "num_blocks": sum(setup.blocks),
        "workers": workers,
    }


def _header_group(group: CacheGroup, layout: CacheLayout) -> dict[str, Any]:
    given = {"window": group.window_size, "chunk": group.chunk_size}
    sizes = {} if group.block_size == layout.block_size else {"block_size": group.block_size}
    return {"kind": _KINDS[group.kind], **{k: v for k, v in given.items() if v is not None}, **sizes}


def summary_of(setup: RankSetup, workers: int, totals: Totals, seconds: float) -> dict[str, Any]:
    """What came of it, for ``--json``."""
    return {
        "model": setup.layout.model,
        "rule": setup.layout.rule,
        "workers": workers,
        **totals.summary(seconds),
        "pool_blocks": sum(setup.blocks),
        "groups": [
            {
                "group": group.group_id,
                "kind": group.kind,
                "window": group.window_size or group.chunk_size,
                "block_size": group.block_size,
                **_counts(totals, group),
            }
            for group in setup.layout.groups
        ],
    }


def _counts(totals: Totals, group: CacheGroup) -> dict[str, int]:
    counted = totals.windows.get(group.group_id)
    return {"stored": counted.stored, "removed": counted.removed} if counted else {"stored": 0, "removed": 0}


def table_of(setup: RankSetup, workers: int, totals: Totals, seconds: float) -> str:
    """What came of it, for people."""
    summary = summary_of(setup, workers, totals, seconds)
    lines = [
        f"{summary['model']}, rule {summary['rule']}, workers {workers}, one pool of "
        f"{summary['pool_blocks']:,} blocks, chunks of {setup.chunk_tokens}",
        *totals.lines(seconds),
        "",
        "group  layers see     block    stored    removed",
    ]
    for group, row in zip(setup.layout.groups, summary["groups"], strict=True):
        numbers = f"{row['block_size']:>9,}{row['stored']:>10,}{row['removed']:>11,}"
        lines.append(f"{group.group_id:>5}  {group.label:<11}{numbers}")
    return "\n".join(lines) + "\n"
