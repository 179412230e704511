"""``vswa explain``: what every rank could reuse of one prompt, and what spoilt the rest."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import msgspec

from vswa_plugin.blocks.hashing import prefix_names
from vswa_plugin.cli.choice import show_choice
from vswa_plugin.cli.explained import show
from vswa_plugin.cli.index import check_namespace, fleet_for
from vswa_plugin.cli.prompts import chat_text, messages_of, text_of, tokens_of
from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.program.options import excludes, requires, seconds, whole_number
from vswa_plugin.registry import Entry
from vswa_plugin.router.http.messages import ExplanationAnswer

_EXAMPLES = """\
examples:
  vswa explain "Once upon a time ..."       as sent to /v1/completions: no <bos>, no chat template
  vswa explain --chat "Once upon a time ..."       as the message of a user, in the model's chat template
  vswa explain --chat --file messages.json  all messages of a chat, as a request has them
  vswa explain --file prompt.txt --model gemma
  vswa explain --token-ids 2,105,2364       no tokenizer needed
  vswa explain --choice --router http://127.0.0.1:8090 "Once upon a time ..."

A prompt given as text is tokenized with the model's own tokenizer.json, which is read at the path that its
workers registered.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", help="the prompt")
    prompt.add_argument("--file", metavar="FILE", help="a file with the prompt; - is standard input")
    prompt.add_argument("--token-ids", metavar="N,N,...", help="the prompt's token ids")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is the message of a user, or in a FILE that ends in .json a list of messages",
    )
    parser.add_argument(
        "--model", help="the name by which clients ask for the model (default: the only one that is served)"
    )
    parser.add_argument("--namespace", help="ask only about workers of this Dynamo namespace")
    parser.add_argument(
        "--choice",
        action="store_true",
        help="show what the router at --router would choose, and what each rank would cost it",
    )
    parser.add_argument("--router", metavar="URL", help="the HTTP API of a router (its --http-port)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--timeout", type=seconds, default=10.0, help="seconds to wait for the workers (10)")


def run(args: argparse.Namespace) -> int:
    check_namespace(args)
    excludes("--chat", args.chat, "--token-ids", args.token_ids)
    if args.token_ids is not None:
        _token_ids(args.token_ids)  # refused now rather than after a wait for the workers
    requires("--router", args.router, "--choice", args.choice)
    if args.choice and args.router is None:
        raise ConfigError(
            "--choice: expected --router with the URL of a router's HTTP API, which knows what is under way; "
            "got none. Start the router with --http-port"
        )
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
        if args.choice:
            return await show_choice(args.router, tokens, entry, args.timeout, args.json)
        hashes = prefix_names(tokens, unit, entry.naming.lookahead)
        found = fleet.index.explain(hashes, len(tokens), entry.served_model_name)
    finally:
        await fleet.stop()
    if args.json:
        print(msgspec.json.encode([ExplanationAnswer.of(each) for each in found]).decode())
    else:
        print(f"{len(tokens)} tokens, {len(hashes)} whole blocks of {unit}")
        show(found, len(tokens))
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
    model_dir = Path(entry.model_path)
    text = args.prompt if args.file is None else text_of(args.file)
    if args.chat:
        is_json = args.file is not None and args.file.endswith(".json")
        text = chat_text(model_dir, messages_of(text, is_json))
    return tokens_of(model_dir, text)


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
