"""Each field of a client's request, sent to Dynamo's real frontend: what comes to a worker is in the tables.

A new release of the frontend that passes on, drops or renames a field fails here, and so does a field that
nobody has named.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from vswa_plugins.gemma3_cpu.serving.fields import FIELDS as GEMMA3_CPU
from vswa_plugins.tensorrt_llm.fields import FIELDS as TENSORRT_LLM
from vswa_plugins.vllm.fields import FIELDS as VLLM

from tests.client_field_samples import BASE, CHAT, COMPLETIONS, SAMPLES, WORKER
from tests.conftest import Brokers, Run
from tests.e2e_helpers import cluster_on, eventually, get, own_namespace, post, running
from vswa_plugin.dynamo.client_fields import CLIENT_FIELDS, LOST, ClientField, Fate
from vswa_plugin.errors import InvalidRequest
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.topologies import WorkerGroup
from vswa_plugin.registry.opening import registry_from_env
from vswa_plugin.router.forward import SPECULATIVE_PREFILL

PLUGIN = str(Path(__file__).parents[1] / "seeing_engine.py")
#: OpenAI's own fields (its API reference, chat completions and completions).
OPENAI = {
    CHAT: """messages model audio frequency_penalty function_call functions logit_bias logprobs
        max_completion_tokens max_tokens metadata modalities n parallel_tool_calls prediction presence_penalty
        prompt_cache_key prompt_cache_retention reasoning_effort response_format safety_identifier seed
        service_tier stop store stream stream_options temperature tool_choice tools top_logprobs top_p user
        verbosity web_search_options""",
    COMPLETIONS: """model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n
        presence_penalty seed stop stream stream_options suffix temperature top_p user""",
}


class Seen:
    """A cluster whose only worker writes down what comes to it."""

    def __init__(self, run: Run[Any], cluster: Cluster, file: Path, worker_id: int) -> None:
        self._run, self.cluster, self._file, self._worker_id = run, cluster, file, worker_id
        self.plain = {path: flat(self.ask(path, {})[2]) for path in BASE}

    def ask(
        self, path: str, fields: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> tuple[int, str, dict[str, Any]]:
        """Status and text of the answer, and what came to the worker; empty where nothing did."""
        self._file.write_text("")
        body = with_worker({**BASE[path], **fields}, self._worker_id)

        async def answered() -> tuple[int, str]:
            async with (
                aiohttp.ClientSession(headers=headers) as http,
                http.post(f"{self.cluster.url}{path}", json=body) as got,
            ):
                return got.status, await got.text()

        status, text = self._run(answered())
        came = self.came()
        return status, text, came[0] if came else {}

    def came(self) -> list[dict[str, Any]]:
        """What has come to the worker since the last request of :meth:`ask` went out."""
        return [json.loads(line) for line in self._file.read_text().splitlines()]

    def changed(self, path: str, came: dict[str, Any]) -> set[str]:
        """Paths of what came that differ from the request without the field."""
        now, plain = flat(came), self.plain[path]
        return {name for name in now.keys() | plain.keys() if now.get(name) != plain.get(name)}


def with_worker(value: Any, worker_id: int) -> Any:
    if isinstance(value, dict):
        return {key: with_worker(each, worker_id) for key, each in value.items()}
    return worker_id if value is WORKER else value


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What says something, by its path in the tables; lists and what the tables do not open stay whole."""
    found: dict[str, Any] = {}
    for key, each in value.items():
        path = f"{prefix}{key}"
        if path in OPENED and isinstance(each, dict):
            found |= flat(each, f"{path}.")
        elif each not in (None, [], {}):
            found[path] = each
    return found


TABLE = GEMMA3_CPU.uses.keys() | TENSORRT_LLM.uses.keys() | VLLM.uses.keys()
OPENED = {path[:at] for path in TABLE for at, each in enumerate(path) if each == "."}


def fields_of(name: str, path: str) -> dict[str, Any]:
    value = SAMPLES[name]
    if isinstance(value, dict) and CHAT in value:
        value = value[path]
    last = name.split(".")
    if isinstance(value, dict) and last[0] in value:
        return value
    for part in reversed(last):
        value = {part: value}
    return dict(value)


@pytest.fixture(scope="module")
def seen(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("fields")
    file = folder / "seen.jsonl"
    settings = ClusterSettings(
        str(model_dir),
        "gemma",
        groups=(WorkerGroup("agg", 1, override={"seen": str(file)}),),
        engine="seeing",
        namespace=own_namespace("fields"),
        worker_options=("--plugin", PLUGIN, "--taint", "gold"),
    )
    made = cluster_on(brokers, folder, settings)
    context = running(made)
    cluster = run(context.__aenter__())

    async def worker_id() -> int:
        registry = registry_from_env({**cluster.env})
        entries = await registry.entries()
        await registry.close()
        (mine,) = [each for each in entries if each.namespace == settings.namespace]
        return mine.worker_id

    yield Seen(run, cluster, file, run(worker_id()))
    run(context.__aexit__(None, None, None))


def checked(field: ClientField, path: str) -> Fate:
    return field.chat if path == CHAT else field.completions


@pytest.mark.parametrize("field", CLIENT_FIELDS, ids=lambda each: each.name)
@pytest.mark.parametrize("path", BASE)
def test_the_frontend_does_with_each_field_what_the_table_says(
    seen: Seen, path: str, field: ClientField
) -> None:
    fate, fields = checked(field, path), fields_of(field.name, path)
    status, text, came = seen.ask(path, fields)
    changed = seen.changed(path, came) if came else set()

    if fate.kind == "refused":
        assert (True, {}) == (status in (400, 501), came)
        assert field.name in text
    else:
        assert came, (status, text)
        assert set() == changed - TABLE, "each of these is a row of the tables of the engines"
    if fate.kind == "passed":
        assert set(fate.paths) <= changed | {"model"}, changed
    if fate.kind == "dropped":
        assert set() == changed


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PARTS = [
    {"type": "text", "text": "what is this"},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
]


def test_an_image_comes_as_a_field_that_engines_refuse(seen: Seen) -> None:
    _, _, came = seen.ask(CHAT, {"messages": [{"role": "user", "content": PARTS}]})

    assert "multi_modal_data" in seen.changed(CHAT, came)
    assert set() == seen.changed(CHAT, came) - TABLE
    for table in (GEMMA3_CPU, TENSORRT_LLM):
        with pytest.raises(InvalidRequest, match=r"^messages \(multi_modal_data\): expected no images"):
            table.check(came)


@pytest.mark.parametrize(
    ("header", "value", "paths"),
    [
        ("x-dynamo-session-id", "s", {"agent_context", "image_cache_scope"}),
        ("x-dynamo-prefill-instance-id", "5", {"routing.prefill_worker_id"}),
        ("x-dynamo-prefill-dp-rank", "1", {"routing.prefill_dp_rank"}),
        ("x-dynamo-meta-a", "b", set()),
        ("x-request-id", "r", set()),
    ],
)
def test_what_headers_add_is_in_the_tables(seen: Seen, header: str, value: str, paths: set[str]) -> None:
    _, _, came = seen.ask(CHAT, {}, {header: value})

    assert paths == seen.changed(CHAT, came)
    assert set() == paths - TABLE


def test_a_prompt_is_computed_ahead_under_the_name_that_our_router_knows(run: Run[Any], seen: Seen) -> None:
    hints = {"nvext": {"agent_hints": {"speculative_prefill": True}}}
    assert 200 == seen.ask(CHAT, hints)[0]
    run(eventually(lambda: len(seen.came()) == 2, "the request for the next turn's prompt"))

    first, ahead = seen.came()
    assert ["gemma", SPECULATIVE_PREFILL] == [first["model"], ahead["model"]]
    assert set() == flat(ahead).keys() - TABLE


def test_the_frontend_names_in_its_log_what_is_lost_without_a_word(seen: Seen) -> None:
    assert seen.cluster.frontend is not None
    (line,) = [each for each in seen.cluster.frontend.log().splitlines() if "drops these fields" in each]

    assert {"logit_bias", "suffix"} <= set(LOST)
    assert ", ".join(LOST) in line


def test_every_field_has_a_sample() -> None:
    assert SAMPLES.keys() == {field.name for field in CLIENT_FIELDS}


@pytest.mark.parametrize("path", BASE)
def test_every_field_of_openai_is_in_the_table(path: str) -> None:
    assert set() == set(OPENAI[path].split()) - {field.name for field in CLIENT_FIELDS}


@pytest.mark.parametrize("path", BASE)
def test_every_field_that_the_frontend_describes_is_in_the_table(
    run: Run[Any], seen: Seen, path: str
) -> None:
    document = json.loads(run(get(f"{seen.cluster.url}/openapi.json"))[1])
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    described = properties(body, document["components"]["schemas"])

    assert len(described) > 15
    assert set() == described - {"nvext"} - {field.name for field in CLIENT_FIELDS}


def properties(schema: Mapping[str, Any], known: Mapping[str, Any]) -> set[str]:
    found = set(schema.get("properties", ()))
    for part in (*schema.get("allOf", ()), *schema.get("anyOf", ()), *schema.get("oneOf", ())):
        found |= properties(part, known)
    if "$ref" in schema:
        found |= properties(known[schema["$ref"].rsplit("/", 1)[-1]], known)
    return found


@pytest.mark.parametrize("inside", ["", "agent_hints", "routing_constraints", "router"])
def test_every_extension_of_dynamo_is_in_the_table(run: Run[Any], seen: Seen, inside: str) -> None:
    """The frontend lists those that it knows where it meets another."""
    unknown: dict[str, Any] = {"nobody_has_this": 1}
    body = {**BASE[COMPLETIONS], "nvext": {inside: unknown} if inside else unknown}
    _, answer = run(post(seen.cluster, COMPLETIONS, body))
    listed = set(re.findall(r"`(\w+)`", answer["message"])) - {"nobody_has_this"}
    names = {field.name for field in CLIENT_FIELDS}
    prefix = f"nvext.{inside}." if inside else "nvext."

    assert {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)} == listed


#: Structs of the runtime with their number of fields: what a worker gets, section by section.
STRUCTS = {
    "PreprocessedRequest": "",
    "StopConditions": "stop_conditions.",
    "SamplingOptions": "sampling_options.",
    "OutputOptions": "output_options.",
    "GuidedDecodingOptions": "sampling_options.guided_decoding.",
    "PrefillResult": "prefill_result.",
}
#: Not of Dynamo's own struct: what other front doors may add.
OTHERS = {
    "priority",
    "sampling_options.guided_decoding.json_object",
    "sampling_options.skip_reading_prefix_cache",
}


def runtime_counts() -> dict[str, set[int]]:
    """How many fields each struct has, as the runtime's own messages say; its types are not in Python."""
    import dynamo._core

    with open(dynamo._core.__file__, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return {
            name: {int(count) for count in re.findall(rf"struct {name} with (\d+) elements".encode(), data)}
            for name in STRUCTS
        }
    finally:
        data.close()


@pytest.mark.parametrize(
    "table", [GEMMA3_CPU, TENSORRT_LLM, VLLM], ids=["gemma3_cpu", "tensorrt_llm", "vllm"]
)
def test_every_field_of_the_runtimes_structs_is_in_the_table(table: Any) -> None:
    counts = {}
    for name, prefix in STRUCTS.items():
        below = {path.removeprefix(prefix).split(".")[0] for path in table.uses if path.startswith(prefix)}
        counts[name] = {len(below - {each.removeprefix(prefix) for each in OTHERS})}

    assert runtime_counts() == counts
