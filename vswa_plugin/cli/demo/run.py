"""``vswa demo``: the whole system once, from a chat request to per-window events, and a verdict."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp

from vswa_plugin.cli import local
from vswa_plugin.cli.demo.report import (
    Answer,
    Tally,
    Transfers,
    checks_of_all,
    checks_of_transfers,
    pages_of,
    show_answer,
    show_moved,
    show_windows,
    verdict,
)
from vswa_plugin.cli.demo.routing import Choices, checks_of_choices, show_choice, show_choices
from vswa_plugin.dynamo.chat import chat_obstacle
from vswa_plugin.dynamo.names import COMPONENTS
from vswa_plugin.engine.contract import ANY_ENGINE
from vswa_plugin.errors import ConfigError
from vswa_plugin.launch.cluster import Cluster, Progress
from vswa_plugin.launch.scratch import open_scratch
from vswa_plugin.launch.serving import progress_from, stop
from vswa_plugin.launch.topologies import Topology, chosen_router, find_topology
from vswa_plugin.program.life import Life, Program
from vswa_plugin.program.options import at_least_one
from vswa_plugin.program.run import exit_code_of
from vswa_plugin.registry import Entry
from vswa_plugin.wire.events import decode
from vswa_plugin.wire.subjects import events_of, source_of
from vswa_plugin.wire.transport import Transport

#: Small enough that three documents do not fit into the sliding pool of one worker, so that blocks go.
_OVERRIDE = {ANY_ENGINE: {"kv_blocks": {"sliding": 96, "global": 200}}}
#: One document and the last window of another; the global windows of all.
_ROUTED_OVERRIDE = {ANY_ENGINE: {"kv_blocks": {"sliding": 80, "global": 320}}}
_SENTENCES = ("Once upon a time", "Water boils at a temperature of", "2 + 2 =")
_DOCUMENTS = ("harbour", "orchard", "railway", "library", "theatre")
#: Which document each request asks about; the third question about one is the first that must hit.
_PLAN = tuple(_DOCUMENTS[which] for which in (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0))
#: Where requests are routed: two turns of a conversation about each document, the first one of another, and
#: back to the first conversation.
_ROUTED_PLAN = (
    *(name for name in _DOCUMENTS for _ in range(2)),
    *(f"{name} 2" for name in _DOCUMENTS),
    *_DOCUMENTS,
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "The demo starts an embedded nats-server and etcd, Dynamo's frontend and workers on free\n"
        "loopback ports. It streams chat requests about three long documents, and counts from the\n"
        "events on NATS what each worker stored and removed per window. Then it stops everything.\n"
        "With disagg, the requests are conversations. The demo shows what each request moved from a\n"
        "prefill to a decode worker, and what a full cache would have moved.\n"
        "With agg_router and disagg_router, they are conversations as well. The demo shows for each\n"
        "request which worker was chosen, what was promised, what was reused, and what the global\n"
        "layers alone would have promised. --router stock shows the same for Dynamo's own router, and\n"
        "with VSWA_DYNAMO_EVENTS=global for that router as it is without this project.\n"
        "Exit code 0 means that all of this was observed."
    )
    local.add_arguments(parser)
    parser.add_argument("--max-tokens", type=at_least_one, default=12, help="length of each answer (12)")


def run(args: argparse.Namespace) -> int:
    local.find_named(args)
    began = time.monotonic()
    topology = find_topology(args.topology)
    routing = chosen_router(args, topology, os.environ)
    small = args.model is None or local.is_named(args.model)
    override = _ROUTED_OVERRIDE if topology.routed else _OVERRIDE
    groups = local.worker_groups(args, topology, override if small else {})
    progress = progress_from(began)
    with open_scratch("demo") as scratch:

        async def make() -> Cluster:
            model = await local.model_path(args, scratch.path, progress)
            if (obstacle := chat_obstacle(model)) is not None:
                raise ConfigError(
                    f"--model: expected one that can chat, as the demo's requests do: {obstacle}"
                )
            options = ("--heartbeat", "0.1", "--status-port", "0")
            return local.cluster_of(args, model, groups, routing, scratch, progress, worker_options=options)

        life = Life("vswa demo")
        demo = _Demo(args, make, progress)
        asyncio.run(life.run(demo))
        if life.stopped_by is not None:
            return exit_code_of(life.stopped_by)
        code = verdict(_checks(demo.seen, topology, small), time.monotonic() - began)
        if code and scratch.has_logs():
            scratch.keep_logs = True
            print(f"logs are kept in {scratch.path}", file=sys.stderr)
        return code


def _checks(seen: _Seen, topology: Topology, pressed: bool) -> dict[str, bool]:
    """Show what was seen, and whether it is what should be."""
    apart = "prefill" in topology.modes
    show_windows(seen.tally, seen.modes if apart else {})
    asked = _ROUTED_PLAN if topology.routed else _PLAN
    checks = checks_of_all(seen.answers, len(asked), seen.tally, seen.codes)
    if apart:
        show_moved(seen.answers)
        checks |= checks_of_transfers(seen.answers, seen.modes, seen.tally, seen.failures, seen.held)
    if seen.choices is not None:
        show_choices(seen.answers, seen.choices)
        checks |= checks_of_choices(seen.answers, seen.choices, pressed=pressed)
    return checks


@dataclass
class _Seen:
    """What one run showed; ``modes`` by worker id, ``codes`` by name of the process."""

    tally: Tally = field(default_factory=Tally)
    answers: list[Answer] = field(default_factory=list)
    modes: dict[int, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    failures: float = 0.0
    held: float = 0.0
    choices: Choices | None = None


class _Demo(Program):
    """Starts everything, asks, and stops everything."""

    def __init__(
        self, args: argparse.Namespace, make: Callable[[], Awaitable[Cluster]], progress: Progress
    ) -> None:
        self.seen = _Seen()
        self._args = args
        self._make = make
        self._progress = progress
        self._cluster: Cluster | None = None
        self._transport: Transport | None = None

    async def start(self) -> None:
        self._cluster = cluster = await self._make()
        await cluster.start_brokers()
        self._transport = Transport(cluster.nats_server, "vswa demo")
        await _listen(self._transport, cluster, self.seen.tally)
        await cluster.start()

    async def serve(self) -> None:
        if self._cluster is not None:
            await _ask(self._cluster, self._args, self.seen, self._progress)

    def hurry(self) -> None:
        if self._cluster is not None:
            self._cluster.hurry()

    async def end(self) -> None:
        try:
            if self._transport is not None:
                await self._transport.close()
        finally:
            self.seen.codes = await stop(self._cluster, self._progress)


async def _ask(cluster: Cluster, args: argparse.Namespace, seen: _Seen, progress: Progress) -> None:
    """Send all requests; ``seen`` gets what they show."""
    routed = cluster.settings.routing.router is not None
    plan = _ROUTED_PLAN if routed else _PLAN
    progress(f"ready; sending {len(plan)} chat requests about {len(_DOCUMENTS)} documents, streamed")
    if args.model is not None:
        await _continue_sentences(cluster)
    entries = await cluster.entries()
    seen.modes = {entry.worker_id: entry.mode for entry in entries}
    apart = "prefill" in seen.modes.values()
    transfers = await _transfers(cluster, entries) if apart else None
    computing = [entry for entry in entries if entry.mode != "decode"]
    pages = partial(pages_of, cluster.router_urls) if cluster.routers else None
    seen.choices = Choices(seen.tally, computing, pages) if routed else None
    asking = _Asking(cluster, seen.tally, transfers, seen.choices)
    async with aiohttp.ClientSession() as session:
        for number, name in enumerate(plan):
            seen.answers.append(await asking.ask(session, number, name, args.max_tokens))
    if transfers is not None:
        seen.failures, seen.held = await transfers.failures(), await transfers.held()
    cluster.check()


async def _transfers(cluster: Cluster, entries: Sequence[Entry]) -> Transfers:
    """Read from the workers' /metrics from now on what goes from prefill to decode."""
    urls = await cluster.status_urls()
    transfers = Transfers(urls["prefill"], urls["decode"], entries[0].groups)
    await transfers.begin()
    return transfers


async def _listen(transport: Transport, cluster: Cluster, tally: Tally) -> None:
    """Count from before the first worker starts, so that nothing is missed."""
    await transport.connect()

    async def count(event_subject: str, payload: bytes) -> None:
        tally.add(source_of(event_subject), decode(payload))

    await transport.subscribe(events_of(cluster.settings.namespace), count)
    await transport.flush()


def document(name: str) -> str:
    """A document of well over 1,000 tokens that differs from the first line on."""
    lines = [f"Rules of the {name}."]
    lines += [
        f"Rule {number} of the {name}: whoever comes before dawn on day {number} shall ring bell "
        f"{number % 7} and wait for {number * 3} minutes."
        for number in range(1, 41)
    ]
    return "\n".join(lines)


class _Asking:
    """One question after the other; where phases run apart or requests are routed, in conversations."""

    def __init__(
        self, cluster: Cluster, tally: Tally, transfers: Transfers | None, choices: Choices | None
    ) -> None:
        self._cluster, self._tally, self._transfers, self._choices = cluster, tally, transfers, choices
        # What a decode worker stores came from a prefill worker, whose blocks decide what is computed.
        self._computes = COMPONENTS["prefill" if transfers else "agg"]
        self._conversations: defaultdict[str, list[dict[str, str]]] = defaultdict(list)

    async def ask(self, session: aiohttp.ClientSession, number: int, name: str, max_tokens: int) -> Answer:
        """The answer to question ``number`` in the conversation ``name`` about the document so called."""
        question = f"Question {number}: which bell on day {number + 3}?"
        goes_on = self._transfers is not None or self._choices is not None
        before = self._conversations[name] if goes_on else []
        content = question if before else f"{document(name.partition(' ')[0])}\n{question}"
        messages = [*before, {"role": "user", "content": content}]
        body = {
            "model": self._cluster.settings.served_model_name,
            "messages": messages,
            "max_tokens": max_tokens,
        }
        recomputed = self._tally.recomputed[self._computes]
        if self._choices is not None:
            await self._choices.begin()
        answer = await stream_chat(session, self._cluster.url, body)
        await self._tally.settled()
        answer.overpromise = self._tally.recomputed[self._computes] - recomputed
        self._conversations[name] = [*messages, {"role": "assistant", "content": answer.text}]
        if self._transfers is not None:
            answer.moved, answer.full = await self._transfers.take(answer.prompt_tokens)
        if self._choices is not None:
            answer.choice = await self._choices.take(answer)
            show_choice(number + 1, name, answer, self._choices)
        else:
            show_answer(number + 1, name, answer)
        return answer


async def _continue_sentences(cluster: Cluster) -> None:
    """Let a model with learnt weights say something; prompts too short for a block, so without events."""
    async with aiohttp.ClientSession() as session:
        for start in _SENTENCES:
            body = {
                "model": cluster.settings.served_model_name,
                # The completions endpoint adds no <bos>, without which Gemma is not itself.
                "prompt": f"<bos>{start}",
                "max_tokens": 20,
                "temperature": 0,
            }
            async with session.post(f"{cluster.url}/v1/completions", json=body) as response:
                answer = await response.json()
            text = (
                answer["choices"][0]["text"] if response.status == 200 else f" [{response.status}: {answer}]"
            )
            print(f"  {start!r} goes on: {text!r}", flush=True)


async def stream_chat(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """Send one streamed chat request and gather what comes."""
    began = time.monotonic()
    body = {
        "temperature": 0,
        "ignore_eos": True,
        "nvext": {"extra_fields": ["worker_id", "timing"]},
        **body,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        answer = Answer(response.status)
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[6:])
            answer.request_id = str(chunk.get("id", "")).partition("-")[2]
            answer.nvext |= chunk.get("nvext") or {}
            if "error" in chunk:
                answer.status = chunk["error"].get("code", 500)
            for choice in chunk.get("choices", []):
                text = choice["delta"].get("content") or ""
                if text and not answer.text:
                    answer.first_token_s = time.monotonic() - began
                answer.text += text
            if usage := chunk.get("usage"):
                answer.prompt_tokens = usage["prompt_tokens"]
                answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return answer
