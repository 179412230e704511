"""The picker beside a real Envoy, before Dynamo's real frontend and workers of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Brokers, Run
from tests.e2e_helpers import cluster_on, eventually, get, long_prompt, own_namespace
from vswa_plugin.dynamo.client import ModelCard
from vswa_plugin.dynamo.preprocess import CHAT, COMPLETIONS, NotRead, Preprocessor
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.topologies import Routing, WorkerGroup
from vswa_plugin.tasks import Tasks

SEEING = str(Path(__file__).parents[1] / "seeing_engine.py")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für eine Stadt",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
USER = {"role": "user", "content": "What is the weather in Köln? 🌦️ \u0061\u0301 ﬁ \u200d \n\t trailing  "}
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
#: What makes a difference between one way to fill a template and another one.
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (CHAT, {"messages": [USER]}),
    "streamed": (CHAT, {"messages": [USER], "stream": True}),
    "system": (CHAT, {"messages": [{"role": "system", "content": "Be brief."}, USER]}),
    "developer": (CHAT, {"messages": [{"role": "developer", "content": "Be brief."}, USER]}),
    "parts": (CHAT, {"messages": [{"role": "user", "content": PARTS}]}),
    "turns": (CHAT, {"messages": [USER, {"role": "assistant", "content": "Rain."}, USER]}),
    "tools": (CHAT, {"messages": [USER], "tools": [TOOL]}),
    "no tools": (CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": "none"}),
    "tool result": (
        CHAT,
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": '{"rain": true}'},
            ],
            "tools": [TOOL],
        },
    ),
    "template arguments": (CHAT, {"messages": [USER], "chat_template_args": {"mood": "grumpy"}}),
    "continued": (
        CHAT,
        {
            "messages": [USER, {"role": "assistant", "content": "It"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ),
    "effort": (CHAT, {"messages": [USER], "reasoning_effort": "high"}),
    "text": (COMPLETIONS, {"prompt": "Grüße aus Köln 🌦️ <bos> <start_of_turn>"}),
    "ids": (COMPLETIONS, {"prompt": [5, 6, 7, 8]}),
    "token_data": (COMPLETIONS, {"prompt": "x", "nvext": {"token_data": [9, 8, 7]}}),
    "salted": (COMPLETIONS, {"prompt": "x", "cache_salt": "a", "nvext": {"annotations": ["token_ids"]}}),
}
#: A template that shows whatever it is given: messages, tools, arguments.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% elif message.content %}"
    "{{ message.content | tojson }}{% endif %}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
    "{% if message.tool_call_id %}({{ message.tool_call_id }}){% endif %}<end_of_turn>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}[{{ mood }}][{{ reasoning_effort }}]"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


async def send(
    cluster: Cluster, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(cluster.url + path, json=body, headers=headers) as answer,
    ):
        return answer.status, await answer.text()


async def value(cluster: Cluster, metric: str, **labels: str) -> float:
    """A metric of all pickers together."""
    total = 0.0
    for url in cluster.router_urls:
        _, text = await get(f"{url}/metrics")
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == metric and labels.items() <= sample.labels.items():
                    total += sample.value
    return total


class Seen:
    """The requests as the workers get them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> list[dict[str, Any]]:
        lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Seen(tmp_path_factory.mktemp("seen") / "requests.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("templated")
    for path in model_dir.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def picked(
    run: Run[Any], brokers: Brokers, model: Path, seen: Seen, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two workers that write down what they get, and two pickers."""
    group = WorkerGroup("agg", 2, override={"seen": str(seen._path), "cache": True, "step_s": 0.002})
    settings = ClusterSettings(
        str(model),
        "m",
        (group,),
        engine="seeing",
        namespace=own_namespace("picked"),
        routing=Routing("picker", 2),
        worker_options=("--heartbeat", "0.1", "--plugin", SEEING),
    )
    cluster = cluster_on(brokers, tmp_path_factory.mktemp("picked"), settings)
    try:
        run(cluster.start())
        yield cluster
    finally:
        codes = run(cluster.stop())
        assert 0 == codes["picker-0"] == codes["picker-1"]


def test_the_tokens_that_are_chosen_by_are_those_that_dynamos_frontend_sends_to_the_worker(
    run: Run[Any], picked: Cluster, model: Path, seen: Seen
) -> None:
    async def body() -> dict[str, tuple[list[int], list[int]]]:
        tasks = Tasks()
        preprocessor = Preprocessor(tasks)
        await preprocessor.start()
        await preprocessor.show(ModelCard("m", str(model), 32, 8_192, 1_000))
        found = {}
        for name, (path, fields) in PROMPTS.items():
            request = {"model": "m", "max_tokens": 1, **fields}
            raw = msgspec.json.decode(json.dumps(request).encode(), type=dict[str, msgspec.Raw])
            ours = list(await preprocessor.token_ids(path, raw))
            before = len(seen.all())
            status, text = await send(picked, path, request)
            assert 200 == status, text
            (got,) = seen.all()[before:]
            found[name] = ours, got["token_ids"]
        with pytest.raises(NotRead, match="messages"):
            await preprocessor.token_ids(CHAT, {"model": msgspec.Raw(b'"m"'), "messages": msgspec.Raw(b"[]")})
        await tasks.stop()
        await preprocessor.stop()
        return found

    found = run(body())

    assert PROMPTS.keys() == found.keys()
    for name, (ours, dynamos) in found.items():
        assert dynamos == ours, name
    different = {tuple(ours) for ours, _ in found.values()}
    assert len(different) >= len(PROMPTS) - 2, "the template shows what it is given"


def test_a_request_goes_where_its_prefix_is_and_no_header_of_its_client_changes_that(
    run: Run[Any], picked: Cluster, seen: Seen
) -> None:
    prompt = long_prompt("pinned")
    body = {"model": "m", "prompt": prompt, "max_tokens": 1}

    async def whole() -> tuple[list[dict[str, Any]], list[int], float]:
        before = len(seen.all())
        picks = await value(picked, "vswa_picker_requests_total", model="m", outcome="picked")
        status, _ = await send(picked, COMPLETIONS, body)
        assert 200 == status
        first = seen.all()[before]["routing"]["backend_instance_id"]
        entries = [each for each in await picked.entries() if each.namespace == picked.settings.namespace]
        others = [entry.worker_id for entry in entries if entry.worker_id != first]
        wrong = str(others[0])
        for name in ("x-dynamo-worker-instance-id", "x-worker-instance-id", "X-Worker-Instance-Id"):
            status, text = await send(picked, COMPLETIONS, body, {name: wrong, "x-dynamo-meta-a": "b"})
            assert 200 == status, text
        pinned = {**body, "nvext": {"backend_instance_id": others[0], "agent_hints": {"osl": 3}}}
        assert 200 == (await send(picked, COMPLETIONS, pinned))[0]
        # Past the picker, at a path that it does not choose for: nothing of the header is left either.
        status, _ = await send(picked, "/v1/nothing", body, {"x-worker-instance-id": "no number"})
        assert 404 == status
        made = await value(picked, "vswa_picker_requests_total", model="m", outcome="picked") - picks
        return seen.all()[before:], [first] * 4 + [others[0]], made

    requests, expected, made = run(whole())

    assert 5 == made == len(requests)
    assert expected == [each["routing"]["backend_instance_id"] for each in requests]
    assert [0] * 5 == [each["routing"]["dp_rank"] for each in requests]


def test_promises_are_compared_with_the_workers_reports_and_nothing_stays_in_the_book(
    run: Run[Any], picked: Cluster
) -> None:
    async def compared() -> float:
        return sum(
            [
                await value(picked, "vswa_router_predictions_total", model="m", result=result)
                for result in ("exact", "over", "under", "unreported")
            ]
        )

    async def body() -> tuple[float, float]:
        before = await compared()
        request = {"model": "m", "prompt": long_prompt("compared"), "max_tokens": 2}
        for _ in range(3):
            assert 200 == (await send(picked, COMPLETIONS, request))[0]

        async def three_more() -> bool:
            return await compared() - before == 3

        await eventually(three_more, "three reports")
        return (
            await value(picked, "vswa_router_reservations"),
            await value(picked, "vswa_router_load_requests"),
        )

    assert (0, 0) == run(body())


def test_pickers_side_by_side_see_the_load_of_each_other_and_a_client_that_goes_ends_it(
    run: Run[Any], picked: Cluster
) -> None:
    """Of one stream under way each picker knows; when its client goes, none does."""
    request = {"model": "m", "prompt": "a b c", "max_tokens": 5_000, "ignore_eos": True, "stream": True}

    async def loads() -> list[float]:
        found = []
        for url in picked.router_urls:
            _, text = await get(f"{url}/metrics")
            found.append(
                sum(
                    sample.value
                    for family in text_string_to_metric_families(text)
                    for sample in family.samples
                    if sample.name == "vswa_router_load_requests"
                )
            )
        return found

    async def body() -> None:
        async def both_know() -> bool:
            return [1, 1] == await loads()

        async def nobody() -> bool:
            return [0, 0] == await loads()

        async with (
            aiohttp.ClientSession() as session,
            session.post(picked.url + COMPLETIONS, json=request) as answer,
        ):
            assert 200 == answer.status
            await answer.content.readany()
            await eventually(both_know, "both pickers know of the stream")
            answer.close()

        await eventually(nobody, "the stream is in no book any more")

    run(body())


def test_what_cannot_be_served_has_its_status_and_what_is_wrong_has_the_frontends(
    run: Run[Any], picked: Cluster
) -> None:
    async def body() -> list[tuple[int, str]]:
        return [
            await send(picked, COMPLETIONS, {"model": "unknown", "prompt": "x"}),
            await send(
                picked, COMPLETIONS, {"model": "m", "prompt": "x", "nvext": {"backend_instance_id": 5}}
            ),
            await send(picked, CHAT, {"model": "m", "messages": []}),
            await send(picked, COMPLETIONS, {"model": "m", "prompt": "x", "temperature": 99}),
        ]

    unknown, pinned, empty, hot = run(body())

    assert (404, True) == (unknown[0], "unknown model 'unknown'. Known: m" in unknown[1])
    assert (400, True) == (pinned[0], "backend_instance_id" in pinned[1])
    assert (400, True) == (empty[0], "messages" in empty[1])
    assert 400 == hot[0]


def test_with_its_pickers_away_requests_go_on_by_the_frontends_own_mode(
    run: Run[Any], picked: Cluster, seen: Seen
) -> None:
    """The last test of this cluster: its pickers are stopped."""

    async def body() -> list[int]:
        await asyncio.gather(*(picker.stop() for picker in picked.routers))
        before = len(seen.all())
        request = {"model": "m", "prompt": long_prompt("alone"), "max_tokens": 1}
        statuses = [(await send(picked, COMPLETIONS, request))[0] for _ in range(2)]
        assert 2 == len(seen.all()) - before
        return statuses

    assert [200, 200] == run(body())
