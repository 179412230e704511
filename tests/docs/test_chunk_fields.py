"""docs/chunk-fields.md against the engines and the programs that read chunks."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vswa_plugin.dynamo.bursts import _PLAIN
from vswa_plugin.engine import WORKER_ONLY
from vswa_plugin.testing.engine_checks import check_answer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "chunk-fields.md").read_text("utf-8")
FIELDS = set(re.findall(r"^\| `([\w.]+)` \|", PAGE, re.M))
#: Where chunks are made and read.
SOURCES = [
    "plugins/gemma3_cpu/serving/generation.py",
    "plugins/tensorrt_llm/answer.py",
    "plugins/tensorrt_llm/engine.py",
    "plugins/vllm/answer.py",
    "vswa_plugin/router/disagg.py",
    "vswa_plugin/router/forward.py",
    "vswa_plugin/worker/handler.py",
]


def named(path: str) -> Iterator[str]:
    """Keys of what is called a chunk in a file, and of dictionaries that look like one."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        match node:
            case ast.Subscript(ast.Name("chunk"), ast.Constant(str(key))):
                yield key
            case ast.Call(ast.Attribute(ast.Name("chunk"), "get" | "pop"), [ast.Constant(str(key)), *_]):
                yield key
            case ast.Dict(keys):
                texts = [key.value for key in keys if isinstance(key, ast.Constant)]
                if {"token_ids", "index"} <= set(texts) or {"log_probs"} & set(texts):
                    yield from map(str, texts)


@pytest.mark.parametrize("path", SOURCES)
def test_every_field_that_is_sent_or_read_is_on_the_page(path: str) -> None:
    found = set(named(path))

    assert found and set() == found - FIELDS


def test_every_field_of_the_page_is_one_that_there_is() -> None:
    sent = {field for path in SOURCES for field in named(path)} | _PLAIN | {WORKER_ONLY}
    inner = {field for field in FIELDS if re.search(rf"^\| `{re.escape(field)}` \| integer", PAGE, re.M)}

    assert FIELDS - inner == sent
    assert inner == {
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        "prompt_tokens_details.cached_tokens",
        "dp_rank",
        "transferred_tokens",
    }


def test_the_least_chunk_is_an_answer_that_the_suite_of_engines_takes() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    chunk: dict[str, Any] = json.loads(text)

    check_answer([chunk], 38, most=1)
