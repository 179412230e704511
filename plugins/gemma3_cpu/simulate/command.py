"""``vswa simulate``: requests through cache managers without a model, as fast as they go."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, cast

import msgspec

from vswa_plugin.engine.presets import listed_models
from vswa_plugin.errors import ConfigError, InvalidRequest, shown
from vswa_plugin.files import read_json_lines

from ..serving.options import RULES, is_number

# The managers are imported when they are needed: every other command of a plugin configures this one too.
if TYPE_CHECKING:
    from ..cache.spec import GroupSpec
    from .models import NewRank
    from .requests import Record, Request, SimulatedWorker, Totals, Worker

_DESCRIPTION = """\
Run requests through cache managers without computing anything: what is reused, what every cache group
stores, evicts and moves, and the KV events an engine would send. The layers are those of gemma-3-1b by
default, cached as TensorRT-LLM does; --model simulates another model with the cache of its engine.
trtllm_v2 and vLLM's manager have been compared with the real ones, the V1 rules with a transcription."""

_EXAMPLES = f"""\
examples:
  vswa simulate                                     1,000 made-up requests through one worker
  vswa simulate --rule trtllm_v1_contiguous         the same through another engine's rules
  vswa simulate --blocks 512=64,global=400          a sliding pool too small for what is asked again
  vswa simulate --from trace.jsonl.gz --json        the requests of a recorded engine
  vswa simulate --out trace.jsonl.gz                write what happened as an engine trace
  vswa simulate --model gemma-4-31b                 a hybrid model, as vLLM caches it

models (cache groups: window, chunk or kind / tokens per block where the engine chooses them):
{listed_models()}

With a model of vLLM, --blocks counts blocks of 32 tokens of global attention; each other group adds half of
that room to the one pool.

A file given with --from has one JSON object per line: {{"token_ids": [...], "output_len": 16}}. In an engine
trace these are the lines of type "request"; headers and events are passed over. A made-up answer ends each
request; the next turns of made-up conversations contain it.
"""

_WINDOWS = "512,512,512,512,512,global"
#: Lines of an engine trace that are no requests.
_PASSED_OVER = ("header", "event")
_GLOBAL = "global"


class _RequestLine(msgspec.Struct):
    token_ids: tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)], ...]
    output_len: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


def configure_simulate(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("--model", metavar="M", help="a known model, of the list below, in place of --windows and --layers")
    add("--rule", help=f"reuse rule: {', '.join(RULES)} (default: {RULES[0]})")
    add(
        "--windows",
        metavar="W,W,...",
        help=f"window of each layer in tokens, or 'global'; repeats over the layers (default: {_WINDOWS})",
    )
    add("--layers", type=_positive, metavar="N", help="layers of the model (default: 26)")
    add("--block-size", type=_positive, metavar="TOKENS", help="tokens of a block (default: 32)")
    add("--blocks", default="512", metavar="N|W=N,...", help="blocks of each window (default: 512)")
    add(
        "--host-blocks",
        metavar="N|W=N,...",
        help="blocks of each window's host tier (default: 0)",
    )
    add(
        "--chunk",
        type=_positive,
        metavar="TOKENS",
        help="tokens that one step computes at most (default: 512; of vLLM's models 8192)",
    )
    add(
        "--max-seq-len",
        type=_positive,
        default=32768,
        metavar="TOKENS",
        help="longest sequence (default: 32768)",
    )
    add("--workers", type=_positive, default=1, metavar="N", help="workers, which serve in turn (default: 1)")
    add(
        "--requests",
        type=_positive,
        metavar="N",
        help="stop after N requests (default: 1000, or all of the file)",
    )
    add("--seed", type=_seed, help="seed of the made-up requests (default: 0)")
    add(
        "--prompt-len",
        type=_positive,
        metavar="TOKENS",
        help="tokens of the made-up prompts, roughly, on average (default: 1000)",
    )
    add(
        "--from",
        dest="source",
        metavar="FILE",
        help="requests as JSON Lines, compressed with gzip or not; - is standard input",
    )
    add("--out", metavar="FILE", help="write an engine trace, compressed where it ends in .gz")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run_simulate(new_rank: NewRank, args: argparse.Namespace) -> int:
    """Run, and print what came of it.

    :param new_rank: simulates ranks of engines that this plugin does not know.
    """
    from . import models

    for option, value in (("--seed", args.seed), ("--prompt-len", args.prompt_len)):
        if value is not None and args.source is not None:
            raise ConfigError(
                f"{option}: expected no --from with it, got {args.source}, whose requests are given"
            )
    for option in ("--windows", "--layers"):
        if args.model is not None and getattr(args, option[2:]) is not None:
            raise ConfigError(
                f"{option}: expected no --model with it, got {args.model}, whose layers are known"
            )
    windows = None if args.model is None else models.windows_of(args.model)
    if args.model is None or windows is not None:
        return _run_own(_with_defaults(args), windows)
    for option in ("--rule", "--host-blocks"):
        if getattr(args, option[2:].replace("-", "_")) is not None:
            raise ConfigError(f"{option}: expected no --model of vLLM with it, got {args.model}")
    setup = models.setup_of(args)
    header = models.header_of(setup, args.workers)
    workers = [models.RankWorker(new_rank(setup)) for _ in range(args.workers)]
    totals, seconds = _run(args, workers, header)
    if args.json:
        _print_json(models.summary_of(setup, args.workers, totals, seconds))
    else:
        sys.stdout.write(models.table_of(setup, args.workers, totals, seconds))
    return 0


def _run_own(args: argparse.Namespace, windows: Sequence[int | None] | None) -> int:
    """With the cache managers of this plugin."""
    windows = _windows(args) if windows is None else _bounded(windows, args)
    groups = _groups(windows, args)
    workers = [_worker(args, groups, rank) for rank in range(args.workers)]
    totals, seconds = _run(args, workers, _header(args, groups, windows))
    if args.json:
        _print_json(_summary(args, groups, totals, seconds))
    else:
        sys.stdout.write(_table(args, groups, totals, seconds))
    return 0


def _run(args: argparse.Namespace, workers: Sequence[Worker], header: dict[str, Any]) -> tuple[Totals, float]:
    """All requests through ``workers``, and the seconds that it took."""
    from .requests import Simulation

    _check_files(args)
    try:
        with contextlib.ExitStack() as stack:
            requests = _requests(args, stack)
            record = _recorder(args, header, stack)
            started = time.perf_counter()
            totals = Simulation(workers, record).run(requests)
            return totals, time.perf_counter() - started
    except InvalidRequest as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        # Errors in the file of requests have been raised where it is read.
        raise ConfigError(f"{args.out}: expected room for the trace, got {error}") from error


def _print_json(summary: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """What is not given, as for TensorRT-LLM."""
    defaults = {
        "rule": RULES[0],
        "windows": _WINDOWS,
        "layers": 26,
        "block_size": 32,
        "host_blocks": "0",
        "chunk": 512,
    }
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **defaults, **given})


def _worker(args: argparse.Namespace, groups: Sequence[GroupSpec], rank: int) -> SimulatedWorker:
    from .requests import SimulatedWorker, manager_for

    manager = manager_for(
        args.rule,
        groups,
        args.block_size,
        args.max_seq_len,
        max_chunk_tokens=args.chunk,
        dp_rank=rank if args.workers > 1 else None,
    )
    return SimulatedWorker(manager, args.block_size, args.chunk)


# -- what is asked for -----------------------------------------------------------------------------


def _windows(args: argparse.Namespace) -> list[int | None]:
    """Window of each layer; None: global, as every one is that no sequence is longer than."""
    pattern = _bounded([_window(word.strip(), "--windows") for word in args.windows.split(",")], args)
    return [pattern[layer % len(pattern)] for layer in range(args.layers)]


def _bounded(windows: Sequence[int | None], args: argparse.Namespace) -> list[int | None]:
    return [None if w is None or w >= args.max_seq_len else w for w in windows]


def _groups(windows: Sequence[int | None], args: argparse.Namespace) -> list[GroupSpec]:
    """A group per window, in order of their first layers, as TensorRT-LLM numbers them."""
    from ..cache.spec import GroupSpec

    distinct = list(dict.fromkeys(windows))
    blocks = _per_window(args.blocks, distinct, "--blocks")
    host = _per_window(args.host_blocks, distinct, "--host-blocks")
    return [
        GroupSpec(i, window, blocks[window], windows.count(window), host[window])
        for i, window in enumerate(distinct)
    ]


def _per_window(text: str, windows: Sequence[int | None], option: str) -> dict[int | None, int]:
    if is_number(text):
        return dict.fromkeys(windows, int(text))
    counts: dict[int | None, int] = {}
    for part in text.split(","):
        label, _, count = part.strip().partition("=")
        if not is_number(count):
            raise ConfigError(f"{option}: expected a number, or window=number for each, got {part!r}")
        counts[_window(label, option)] = int(count)
    if set(counts) != set(windows):
        labels = " and ".join(_label(window) for window in windows)
        raise ConfigError(f"{option}: expected a number for each of the windows {labels}, got {text!r}")
    return counts


def _window(word: str, option: str) -> int | None:
    if word == _GLOBAL:
        return None
    if not is_number(word) or int(word) < 1:
        raise ConfigError(f"{option}: expected a window in tokens or 'global', got {word!r}")
    return int(word)


def _label(window: int | None) -> str:
    return _GLOBAL if window is None else str(window)


def _requests(args: argparse.Namespace, stack: contextlib.ExitStack) -> Iterator[Request]:
    from .requests import Workload

    if args.source is None:
        return islice(Workload(args.seed or 0, args.prompt_len or 1000), args.requests or 1000)
    lines = sys.stdin.buffer if args.source == "-" else stack.enter_context(_opened(args.source, "rb"))
    return islice(_read(lines, args.source), args.requests)


def _read(lines: IO[bytes], name: str) -> Iterator[Request]:
    decoder = msgspec.json.Decoder()
    try:
        for number, line in read_json_lines(lines, name, "a JSON object"):
            where = f"{name}, line {number}"
            try:
                record = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeError) as error:
                raise ConfigError(f"{where}: expected a JSON object, got {error}") from error
            if not isinstance(record, dict) or record.get("type") not in _PASSED_OVER:
                yield _request(record, where)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{name}: expected JSON Lines, plain or compressed, got {error}") from error


def _request(record: object, where: str) -> Request:
    from .requests import Request

    try:
        read = msgspec.convert(record, _RequestLine)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f'{where}: expected {{"token_ids": [...], "output_len": n}} with token ids in [0, 2**32) and n '
            f"from 1 to {1 << 24}: {error}"
        ) from error
    return Request(read.token_ids, read.output_len)


# -- what came of it -------------------------------------------------------------------------------


def _recorder(
    args: argparse.Namespace, header: dict[str, Any], stack: contextlib.ExitStack
) -> Callable[[Record], None]:
    if args.out is None:
        return lambda line: None
    file = stack.enter_context(_opened(args.out, "wb"))
    encoder = msgspec.json.Encoder()

    def record(line: Record) -> None:
        file.write(encoder.encode(line) + b"\n")

    record(header)
    return record


def _header(
    args: argparse.Namespace, groups: Sequence[GroupSpec], windows: Sequence[int | None]
) -> dict[str, Any]:
    """As recorded engines have it, and which rule and how many workers."""
    sliding = [group for group in groups if group.window_size is not None]
    one = len(sliding) == 1
    kinds = {g.window_size: "swa" if one and g.window_size else g.label for g in groups}
    return {
        "type": "header",
        "format": "trtllm",
        "engine": "gemma3_cpu, simulated",
        "rule": args.rule,
        "tokens_per_block": args.block_size,
        "max_attention_window": sliding[0].window_size if one else [g.window_size for g in sliding],
        "layers": [kinds[window] for window in windows],
        "chunk_size": args.chunk,
        "max_seq_len": args.max_seq_len,
        "gpu_blocks": {kinds[g.window_size]: g.num_blocks for g in groups},
        "host_blocks": {kinds[g.window_size]: g.host_blocks for g in groups if g.host_blocks} or None,
        "workers": args.workers,
    }


def _summary(
    args: argparse.Namespace, groups: Sequence[GroupSpec], totals: Totals, seconds: float
) -> dict[str, Any]:
    return {
        "rule": args.rule,
        "workers": args.workers,
        **totals.summary(seconds),
        "windows": [
            {
                "window": group.window_size,
                "blocks": group.num_blocks,
                "host_blocks": group.host_blocks,
                **msgspec.to_builtins(totals.windows[group.window_size or args.max_seq_len]),
            }
            for group in groups
        ],
    }


def _table(args: argparse.Namespace, groups: Sequence[GroupSpec], totals: Totals, seconds: float) -> str:
    summary = _summary(args, groups, totals, seconds)
    lines = [
        f"rule {args.rule}, workers {args.workers}, blocks of {args.block_size} tokens, "
        f"chunks of {args.chunk}",
        *totals.lines(seconds),
        "",
        "window     blocks    on host     stored    removed      moved",
    ]
    for row in summary["windows"]:
        numbers = [row[key] for key in ("blocks", "host_blocks", "stored", "removed", "moved")]
        lines.append(f"{_label(row['window']):<6}" + "".join(f"{number:>11,}" for number in numbers))
    return "\n".join(lines) + "\n"


def _check_files(args: argparse.Namespace) -> None:
    """Refuse to write over what is being read."""
    if args.out is None or args.source in (None, "-"):
        return
    source, out = Path(args.source), Path(args.out)
    if source.exists() and out.exists() and source.samefile(out):
        raise ConfigError(f"--out: expected another file than --from, got {out} for both")


def _opened(path: str, mode: str) -> IO[bytes]:
    try:
        if path.endswith(".gz"):
            return cast(IO[bytes], gzip.open(path, mode))
        return cast(IO[bytes], Path(path).open(mode))
    except OSError as error:
        doing = "read" if mode == "rb" else "written"
        raise ConfigError(f"{Path(path)}: expected a file that can be {doing}, got {error}") from error


def _seed(text: str) -> int:
    if not is_number(text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {shown(text)}")
    return int(text)


def _positive(text: str) -> int:
    if not is_number(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {shown(text)}")
    return int(text)
