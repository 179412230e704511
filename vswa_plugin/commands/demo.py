"""``vswa demo``: the whole system once, from a chat request to per-window events, and a verdict."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from vswa_plugin.cluster import Cluster, ClusterSettings
from vswa_plugin.commands import local
from vswa_plugin.commands.events import Follower
from vswa_plugin.errors import ConnectError
from vswa_plugin.events import Batch, Removed, Source, Stored, decode
from vswa_plugin.transport import Transport, events_of, source_of

#: Small enough that three documents do not fit into the sliding pool of one worker, so that blocks go.
_OVERRIDE = {"gemma3_cpu": {"kv_blocks": {"512": 96, "global": 200}}}
_SENTENCES = ("Once upon a time", "Water boils at a temperature of", "2 + 2 =")
_DOCUMENTS = ("harbour", "orchard", "railway")
#: Which document each request asks about; the third question about one is the first that must hit.
_PLAN = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "What happens: an embedded nats-server and etcd, Dynamo's frontend and two gemma3_cpu workers start\n"
        "on free loopback ports; chat requests about three long documents are streamed; what each worker\n"
        "stored and removed per window is counted from its events on NATS; everything stops. Exit code 0:\n"
        "all of it was seen to work."
    )
    local.add_arguments(parser)
    parser.add_argument("--max-tokens", type=int, default=12, help="length of each answer (12)")


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_demo(args))


@dataclass
class Answer:
    """One streamed answer as the client saw it."""

    status: int
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: float = 0.0
    #: Tokens that global blocks alone would have promised and the engine computed again.
    overpromise: int = 0


@dataclass
class Tally:
    """Blocks per (worker, window), counted from the wire."""

    follower: Follower = field(default_factory=Follower)
    stored: Counter[tuple[int, str]] = field(default_factory=Counter)
    removed: Counter[tuple[int, str]] = field(default_factory=Counter)
    resident: defaultdict[tuple[int, str], set[int]] = field(default_factory=lambda: defaultdict(set))
    #: Tokens stored again for a sliding window while the global window held the same blocks.
    recomputed: int = 0
    gaps: int = 0

    def add(self, source: Source, batch: Batch) -> None:
        self.gaps += sum("gap" in line for line in self.follower.lines(source, batch))
        for event in batch.events:
            if not isinstance(event, Stored | Removed):
                continue
            key = (source.worker_id, self.follower.label(source, event.group_id))
            if isinstance(event, Stored):
                self._count_recomputed(source, event)
                self.stored[key] += len(event.sequence_hashes)
                self.resident[key].update(event.sequence_hashes)
            else:
                self.removed[key] += len(event.sequence_hashes)
                self.resident[key].difference_update(event.sequence_hashes)

    def _count_recomputed(self, source: Source, event: Stored) -> None:
        """A sliding group announces its blocks before the global one does: what is global already was so."""
        group = self.follower.groups[source][event.group_id]
        if group.window_size is not None:
            held = self.resident[source.worker_id, "window global"].intersection(event.sequence_hashes)
            self.recomputed += len(held) * group.block_size

    def windows(self) -> set[str]:
        return {window for _, window in self.stored}

    async def settled(self) -> None:
        """Return once each worker has sent two more heartbeats: what came before has then been counted."""
        beats = self.follower.heartbeats
        target = {source: seen + 2 for source, seen in beats.items()}
        deadline = time.monotonic() + 10
        while any(beats[source] < count for source, count in target.items()):
            if time.monotonic() > deadline:
                raise ConnectError("expected heartbeats of each worker within 10 s, got none")
            await asyncio.sleep(0.01)


async def _demo(args: argparse.Namespace) -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vswa-demo-") as folder:
        progress = local.progress_from(began)
        model = await local.model_path(args, Path(folder), progress)
        settings = ClusterSettings(
            model_path=str(model),
            served_model_name=args.served_model_name,
            workers=args.workers,
            engine_args=args.engine_args,
            override=_OVERRIDE if args.model is None or local.is_named(args.model) else {},
            http_port=args.http_port,
            worker_options=("--heartbeat", "0.1"),
        )
        cluster = Cluster(settings, local.log_folder(args, Path(folder)), progress)
        tally = Tally()
        answers: list[Answer] = []
        transport: Transport | None = None
        try:
            await cluster.start_brokers()
            transport = await _listen(cluster, tally)
            await cluster.start()
            progress(f"ready; sending {len(_PLAN)} chat requests about {len(_DOCUMENTS)} documents, streamed")
            if args.model is not None:
                await _continue_sentences(cluster)
            answers = [answer async for answer in _ask(cluster, tally, args.max_tokens)]
            cluster.check()
        finally:
            progress("stopping")
            if transport is not None:
                await transport.close()
            codes = await cluster.stop()
        _show(tally)
        return _verdict(answers, tally, codes, time.monotonic() - began)


async def _listen(cluster: Cluster, tally: Tally) -> Transport:
    """Count from before the first worker starts, so that nothing is missed."""
    transport = Transport(cluster.nats_server, "vswa demo")
    await transport.connect()

    async def count(event_subject: str, payload: bytes) -> None:
        tally.add(source_of(event_subject), decode(payload))

    await transport.subscribe(events_of(cluster.settings.namespace), count)
    await transport.flush()
    return transport


def document(name: str) -> str:
    """A document of well over 1,000 tokens that differs from the first line on."""
    lines = [f"Rules of the {name}."]
    lines += [
        f"Rule {number} of the {name}: whoever comes before dawn on day {number} shall ring bell "
        f"{number % 7} and wait for {number * 3} minutes."
        for number in range(1, 41)
    ]
    return "\n".join(lines)


async def _ask(cluster: Cluster, tally: Tally, max_tokens: int) -> AsyncIterator[Answer]:
    async with aiohttp.ClientSession() as session:
        for number, which in enumerate(_PLAN):
            name = _DOCUMENTS[which]
            messages = [
                {
                    "role": "user",
                    "content": f"{document(name)}\nQuestion {number}: which bell on day {number + 3}?",
                }
            ]
            body = {
                "model": cluster.settings.served_model_name,
                "messages": messages,
                "max_tokens": max_tokens,
            }
            recomputed = tally.recomputed
            answer = await stream_chat(session, cluster.url, body)
            await tally.settled()
            answer.overpromise = tally.recomputed - recomputed
            _print_answer(number + 1, name, answer)
            yield answer


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


def _print_answer(number: int, name: str, answer: Answer) -> None:
    reuse = f"{answer.cached_tokens:4d} of {answer.prompt_tokens} prompt tokens reused"
    first = f"first token after {answer.first_token_s * 1000:4.0f} ms"
    print(f"  {number:2d}. {name:8} {reuse}, {first}  {answer.text[:40]!r}", flush=True)
    if answer.overpromise:
        print(
            f"      ^ the global layers still held {answer.overpromise} of these tokens, and a router that\n"
            "        counts them alone would have promised a hit; the sliding layers' blocks had gone",
            flush=True,
        )


async def stream_chat(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """Send one streamed chat request and gather what comes."""
    began = time.monotonic()
    body = {
        "temperature": 0,
        "ignore_eos": True,
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


def _show(tally: Tally) -> None:
    print("\nper worker and window, from the events on NATS:")
    print(f"  {'worker':18}{'window':16}{'stored':>8}{'removed':>9}{'resident':>10}")
    for worker_id, window in sorted(tally.stored):
        stored, removed = tally.stored[worker_id, window], tally.removed[worker_id, window]
        print(f"  {worker_id:<18x}{window:16}{stored:8d}{removed:9d}{stored - removed:10d}")


def _verdict(answers: list[Answer], tally: Tally, codes: dict[str, int], took_s: float) -> int:
    """Say what held and what did not; the exit code."""
    checks = {
        "every request was answered": len(answers) == len(_PLAN)
        and all(a.status == 200 and a.text for a in answers),
        "prompts are longer than 1,000 tokens": all(a.prompt_tokens > 1000 for a in answers),
        "prefixes were reused": sum(a.cached_tokens for a in answers) > 0,
        "events of both windows arrived": len(tally.windows()) >= 2,
        "no event was missed": tally.gaps == 0,
        "everything stopped cleanly": all(
            code == 0 for name, code in codes.items() if name.startswith("worker")
        ),
    }
    print()
    for what, held in checks.items():
        print(f"  {'ok  ' if held else 'FAIL'}  {what}")
    good = all(checks.values())
    print(f"\n{'demo passed' if good else 'demo FAILED'} in {took_s:.1f} s")
    if not good:
        sys.stderr.write("run it again with --log-dir DIR to keep the logs of all processes\n")
    return 0 if good else 1
