"""The requests of one run, made from a seed and the parameters of a file in workloads/. Pure.

A prompt is a list of token ids, so that what is shared is exact and no tokenizer has a part in it. Kinds:

* ``chat``: a system prompt that many chats share, and one more turn each time. Answers in the history are
  made up, so that every policy is sent the very same tokens;
* ``question``: a whole document that many ask about, and a question;
* ``fork``: the first part of a document, cut anywhere, and a question: the global layers may be all that
  still holds it;
* ``fresh``: nothing shared.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: All have four digits, so that requests of one length have one size.
TOKENS = range(1_000, 10_000)
#: The first token of whatever is shared; that of a run takes its place, see :func:`bodies`.
ROOT = 1_000


@dataclass
class Request:
    """:param after: number of the request that must have been answered before; None: none."""

    kind: str
    prompt: list[int]
    max_tokens: int
    after: int | None = None


@dataclass
class _Chat:
    history: list[int]
    last: int | None = None
    turns: int = 0


@dataclass
class _Maker:
    given: Mapping[str, Any]
    rng: random.Random
    systems: list[list[int]] = field(default_factory=list)
    documents: list[list[int]] = field(default_factory=list)
    chats: list[_Chat] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.systems = [self.root("system_tokens") for _ in range(self.given["systems"])]
        self.documents = [self.root("document_tokens") for _ in range(self.given["documents"])]

    def between(self, name: str) -> int:
        low, high = self.given[name]
        return self.rng.randint(low, high)

    def tokens(self, name: str) -> list[int]:
        return self.rng.choices(TOKENS, k=self.between(name))

    def root(self, name: str) -> list[int]:
        return [ROOT, *self.tokens(name)]

    def document(self) -> list[int]:
        """Some are read far more often than others."""
        weights = [1 / (1 + place) for place in range(len(self.documents))]
        return self.rng.choices(self.documents, weights)[0]

    def chat(self, number: int) -> Request:
        """The next turn of a chat whose last one is long enough ago, else a new chat."""
        due = [chat for chat in self.chats if chat.last is None or number - chat.last >= self.given["gap"]]
        if due and len(self.chats) >= self.given["chats"]:
            chat = self.rng.choice(due)
        else:
            chat = _Chat(list(self.rng.choice(self.systems)))
            self.chats.append(chat)
        chat.history += self.tokens("turn_tokens")
        made = Request("chat", list(chat.history), self.between("output_tokens"), chat.last)
        chat.history += self.rng.choices(TOKENS, k=made.max_tokens)
        chat.last, chat.turns = number, chat.turns + 1
        if chat.turns == self.given["turns"] or len(chat.history) > self.given["longest"]:
            self.chats.remove(chat)
        return made

    def make(self, number: int) -> Request:
        kinds: Mapping[str, float] = self.given["kinds"]
        (kind,) = self.rng.choices(list(kinds), list(kinds.values()))
        if kind == "chat":
            return self.chat(number)
        if kind == "question":
            prompt = self.document() + self.tokens("turn_tokens")
        elif kind == "fork":
            document = self.document()
            prompt = document[: self.rng.randint(len(document) // 4, len(document))] + self.tokens(
                "turn_tokens"
            )
        elif kind == "fresh":
            prompt = self.root("fresh_tokens")
        else:
            raise ValueError(f"kinds: expected chat, question, fork and fresh, got {kind}")
        return Request(kind, prompt, self.between("output_tokens"))


def load(path: Path) -> dict[str, Any]:
    """The parameters of a workload; its name is that of the file."""
    return {"name": path.stem, **json.loads(path.read_text())}


def make(given: Mapping[str, Any]) -> list[Request]:
    """The requests, in the order in which they are sent."""
    maker = _Maker(given, random.Random(given["seed"]))
    return [maker.make(number) for number in range(given["requests"])]


def arrivals(given: Mapping[str, Any]) -> list[float]:
    """When each request is sent at the earliest, in seconds; all at once without a ``rate``."""
    if given.get("rate") is None:
        return [0.0] * given["requests"]
    rng, now, times = random.Random(given["seed"] + 1), 0.0, []
    for _ in range(given["requests"]):
        times.append(now)
        now += rng.expovariate(given["rate"])
    return times


def bodies(requests: list[Request], model: str, run: int) -> list[bytes]:
    """What is sent to the frontend for each request.

    Every prompt of a run begins with a token of that run, so it shares nothing with what earlier runs left in
    the caches, and within the run it shares what it shared before.
    """
    rest = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    rest["nvext"] = {"extra_fields": ["worker_id", "timing"]}
    made = []
    for request in requests:
        prompt = [TOKENS.stop + run, *request.prompt[1:]]
        body = {"model": model, "prompt": prompt, "max_tokens": request.max_tokens, **rest}
        made.append(json.dumps(body, separators=(",", ":")).encode())
    return made
