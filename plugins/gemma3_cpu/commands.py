"""``vswa make-model``, ``import-gguf``, ``get-model``: Gemma 3 checkpoints from nothing, a file, a name."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vswa_plugin.errors import ConfigError, shown

#: Layers per global layer in Gemma 3.
_PATTERN = 6


def configure_make_model(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a small random Gemma 3 as a Hugging Face directory: config, weights, tokenizer and chat "
        "template. Its answers are gibberish; everything else is real. Nothing is downloaded."
    )
    parser.add_argument("directory", metavar="DIR", help="where to write it; made if it does not exist")
    parser.add_argument(
        "--seed", type=_seed, default=0, help="the same seed gives the same weights (default: 0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")
    parser.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="number of layers, of which every sixth has global attention",
    )
    parser.add_argument(
        "--window", type=_positive, metavar="TOKENS", help="attention window of the sliding layers"
    )
    parser.add_argument(
        "--context", type=_positive, metavar="TOKENS", help="longest sequence that the model takes"
    )


def run_make_model(args: argparse.Namespace) -> int:
    from .model.config import load_config
    from .weights.checkpoint import make_checkpoint

    if args.window is not None and args.layers == 1:
        raise ConfigError("--window: expected --layers of at least 2 with it, got 1, which is global")
    make_checkpoint(args.directory, seed=args.seed, overwrite=args.overwrite, overrides=_overrides(args))
    config = load_config(args.directory)
    windows = ", ".join("global" if window is None else str(window) for window in config.groups)
    print(
        f"{args.directory}: a random Gemma 3 with {config.num_hidden_layers} layers, windows {windows}, "
        f"context {config.max_position_embeddings} tokens, seed {args.seed}"
    )
    return 0


def configure_import_gguf(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Convert a GGUF file of a Gemma 3 to a Hugging Face directory: config, weights (quantized ones as "
        "float16), tokenizer and chat template. Needs the extra gguf."
    )
    parser.add_argument("file", metavar="FILE", help="the GGUF file")
    parser.add_argument("directory", metavar="DIR", help="where to write it; made if it does not exist")
    parser.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")


def run_import_gguf(args: argparse.Namespace) -> int:
    from .model.config import load_config
    from .weights.gguf_import import import_gguf

    import_gguf(args.file, args.directory, args.overwrite)
    config = load_config(args.directory)
    windows = ", ".join("global" if window is None else str(window) for window in config.groups)
    print(f"{args.directory}: a Gemma 3 with {config.num_hidden_layers} layers, windows {windows}")
    return 0


def configure_get_model(parser: argparse.ArgumentParser) -> None:
    from .weights.named import MODELS

    parser.description = (
        "Install a model by name and convert it into the cache, unless it is there already; print its "
        "directory. Its licence terms are shown before anything is installed."
    )
    parser.add_argument("name", metavar="NAME", help=f"one of: {', '.join(MODELS)}")


def run_get_model(args: argparse.Namespace) -> int:
    from .weights.named import get_model

    print(get_model(args.name, lambda line: print(line, file=sys.stderr, flush=True)))
    return 0


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    options = {
        "num_hidden_layers": args.layers,
        "sliding_window": args.window,
        "max_position_embeddings": args.context,
    }
    overrides = {key: value for key, value in options.items() if value is not None}
    if args.layers is not None:
        # A model of fewer layers than the pattern would have no global layer at all.
        overrides["sliding_window_pattern"] = min(_PATTERN, args.layers)
    return overrides


def _seed(text: str) -> int:
    from .serving.options import is_number

    if not is_number(text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {shown(text)}")
    return int(text)


def _positive(text: str) -> int:
    from .serving.options import is_number

    if not is_number(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {shown(text)}")
    return int(text)
