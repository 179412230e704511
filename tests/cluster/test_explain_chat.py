"""``vswa explain --chat`` makes of messages the tokens that Dynamo's frontend makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import Run
from vswa_plugin.cli.prompts import chat_text, tokens_of
from vswa_plugin.launch.cluster import Cluster

CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  é\n\n{{ x }} <bos> \t"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three\n"},
    ],
]


async def frontends_tokens(cluster: Cluster, messages: list[dict[str, Any]]) -> list[int]:
    """As its annotation of the answer says."""
    body = {
        "model": cluster.settings.served_model_name,
        "messages": messages,
        "max_tokens": 1,
        "stream": True,
    }
    body["nvext"] = {"annotations": ["token_ids"]}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{cluster.url}/v1/chat/completions", json=body) as answer,
    ):
        lines = (await answer.text()).splitlines()
    stated = lines[lines.index("event: token_ids") + 1].removeprefix(": ")
    ids: list[int] = json.loads(json.loads(stated))
    return ids


@pytest.mark.parametrize("messages", CHATS, ids=["one", "system", "turns"])
def test_the_tokens_are_those_of_the_frontend(
    run: Run[Any], cluster: Cluster, messages: list[dict[str, Any]]
) -> None:
    model = Path(cluster.settings.model_path)

    assert run(frontends_tokens(cluster, messages)) == tokens_of(model, chat_text(model, messages))
