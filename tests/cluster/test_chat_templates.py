"""A model without a chat template, behind Dynamo's real frontend: it is served for completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

from tests.conftest import Brokers, Run
from tests.e2e_helpers import own_namespace, post
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.serving import how_to_use
from vswa_plugin.launch.topologies import Routing

SMALL = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 2}


def without_template(directory: Path) -> Path:
    make_checkpoint(directory, overrides=SMALL)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    return directory


async def status_of(url: str, body: dict[str, Any]) -> int:
    """Of an answer that need not be JSON."""
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        return answer.status


@pytest.mark.parametrize("routing", [Routing(), Routing("exact")], ids=["no router", "exact"])
def test_a_model_without_a_chat_template_is_served_for_completions(
    run: Run[Any], brokers: Brokers, tmp_path: Path, routing: Routing
) -> None:
    settings = ClusterSettings(
        model_path=str(without_template(tmp_path / "model")),
        served_model_name="base",
        namespace=own_namespace("base"),
        routing=routing,
    )
    cluster = Cluster(settings, tmp_path)
    cluster.nats_server, cluster.etcd_endpoints = brokers.nats_server, brokers.etcd_endpoints

    async def body() -> tuple[int, int, str, str]:
        try:
            await cluster.start()
            request = {"model": "base", "max_tokens": 2}
            completion, _ = await post(cluster, "/v1/completions", {**request, "prompt": "Hello"})
            message = {"role": "user", "content": "Hello"}
            chat = await status_of(f"{cluster.url}/v1/chat/completions", {**request, "messages": [message]})
            log = "".join(child.log() for child in (*cluster.routers, *cluster.workers))
            return completion, chat, log, how_to_use(cluster)
        finally:
            await cluster.stop()

    completion, chat, log, hint = run(body())

    assert 200 == completion
    assert 404 == chat, "Dynamo's own answer where a model is not served for chat"
    assert "for completions alone" in log
    assert "expected a chat_template in" in log
    assert "/v1/completions" in hint
    assert "/chat/" not in hint


def test_a_frontend_that_cannot_use_a_model_is_quoted(
    run: Run[Any], brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that is there, and that only its renderer finds wrong."""
    model = without_template(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% if %}")
    said: list[str] = []
    settings = ClusterSettings(str(model), "broken", namespace=own_namespace("broken"))
    cluster = Cluster(settings, tmp_path, said.append)
    cluster.nats_server, cluster.etcd_endpoints = brokers.nats_server, brokers.etcd_endpoints
    monkeypatch.setattr("vswa_plugin.launch.cluster.READY_TIMEOUT_S", 5.0)

    async def body() -> str:
        try:
            await cluster.start()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            await cluster.stop()
        return "it is served"

    message = run(body())

    assert message.startswith("ConnectError: frontend: not serving broken after 5 s"), message
    assert "the frontend says: prompt_formatter_from_mdc: syntax error" in message
    assert any("does not serve broken yet: prompt_formatter_from_mdc" in line for line in said)
