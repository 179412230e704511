"""``vswa explain``: what every rank could reuse of one prompt, and what spoilt the rest."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import msgspec

from vswa_plugin.blocks.hashing import prefix_names
from vswa_plugin.cli.index import check_namespace, fleet_for
from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.files import read_bounded
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.index import Explanation
from vswa_plugin.program.options import seconds, whole_number
from vswa_plugin.registry import Entry
from vswa_plugin.router.http.messages import ExplanationAnswer

_EXAMPLES = """\
examples:
  vswa explain "Once upon a time ..."       as sent to /v1/completions: no <bos>, no chat template
  vswa explain --file prompt.txt --model gemma
  vswa explain --token-ids 2,105,2364       no tokenizer needed

A prompt given as text is tokenized with the model's own tokenizer.json; needs the package tokenizers and
the model's directory at the path that its workers registered.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", help="the prompt")
    prompt.add_argument("--file", metavar="FILE", help="a file with the prompt; - is standard input")
    prompt.add_argument("--token-ids", metavar="N,N,...", help="the prompt's token ids")
    parser.add_argument(
        "--model", help="the name by which clients ask for the model (default: the only one that is served)"
    )
    parser.add_argument("--namespace", help="ask only about workers of this Dynamo namespace")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--timeout", type=seconds, default=10.0, help="seconds to wait for the workers (10)")


def run(args: argparse.Namespace) -> int:
    check_namespace(args)
    if args.token_ids is not None:
        _token_ids(args.token_ids)  # refused now rather than after a wait for the workers
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    fleet = fleet_for(args)
    try:
        await fleet.start(args.timeout)
        fleet.check_found()
        if not await fleet.settled(args.timeout):
            sys.stderr.write("not every rank is known exactly yet: scores may be too low\n")
        entry = _entry_of(fleet, args.model)
        tokens = _tokens(args, entry)
        unit = entry.naming.hash_block_size
        hashes = prefix_names(tokens, unit, entry.naming.lookahead)
        found = fleet.index.explain(hashes, len(tokens), entry.served_model_name)
    finally:
        await fleet.stop()
    if args.json:
        print(msgspec.json.encode([ExplanationAnswer.of(each) for each in found]).decode())
    else:
        print(f"{len(tokens)} tokens, {len(hashes)} whole blocks of {unit}")
        for explanation in sorted(found, key=lambda each: -each.cached_tokens):
            _show(explanation)
    return 0


def _entry_of(fleet: Fleet, model: str | None) -> Entry:
    """A worker of the model that is asked for."""
    by_model = {entry.served_model_name: entry for entry in fleet.entries.values()}
    if model is None and len(by_model) == 1:
        return next(iter(by_model.values()))
    known = ", ".join(sorted(by_model)) or "none"
    if model is None:
        raise ConfigError(f"expected --model where several models are served, got none. Known: {known}")
    if model not in by_model:
        raise ConfigError(f"--model: unknown model {model!r}. Known: {known}")
    return by_model[model]


def _tokens(args: argparse.Namespace, entry: Entry) -> list[int]:
    if args.token_ids is not None:
        return _token_ids(args.token_ids)
    text = args.prompt if args.file is None else _text_of(args.file)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            "expected the package tokenizers for a prompt in words: install it, or give --token-ids"
        ) from error
    path = Path(entry.model_path) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"expected the model's tokenizer at {path}, got nothing there; give --token-ids")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise ConfigError(
            f"{path}: expected a tokenizer, got: {str(error)[:200]}; give --token-ids"
        ) from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _token_ids(text: str) -> list[int]:
    ids = []
    for part in text.split(","):
        number = whole_number(part.strip())
        if number is None or number >= 1 << 32:
            raise ConfigError(
                f"--token-ids: expected numbers from 0 to 2**32 - 1 with commas between, got {shown(part)}"
            )
        ids.append(number)
    return ids


def _text_of(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else read_bounded(file, "a prompt").decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--file: expected text in UTF-8 in {file}, got {error}") from error


def _show(found: Explanation) -> None:
    scored = "" if found.scored else "  (not scored: stale or silent)"
    print(f"\nrank {found.rank}: {found.cached_tokens} tokens, rule {found.rule}{scored}")
    if found.failed is not None:
        print(f"  nothing is promised, because its rule has failed: {found.failed}")
    print(f"  resumes at block {found.boundary} of {found.boundaries}")
    for group in found.groups:
        held = ", ".join(f"{first}..{end - 1}" for first, end in group.held) or "none"
        line = f"  window {group.group.label:>7}: holds blocks {held}"
        if group.spoilt is not None:
            line += f"; block {group.spoilt} is missing for the next boundary"
        print(line)
