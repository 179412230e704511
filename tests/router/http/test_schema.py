"""The OpenAPI document describes what the server does: made-up requests get what it says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.properties import examples
from tests.router_http_helpers import PROMPT, A, Api, entry_of, run, stored
from vswa_plugin.router.http.openapi import document
from vswa_plugin.router.http.operations import OPERATIONS
from vswa_plugin.router.selector.choices import NVEXT

SCHEMA = document()


class OnePrompt:
    """Stands for Dynamo's preprocessor: each text is the same prompt."""

    async def token_ids(self, path: str, body: object) -> list[int]:
        return PROMPT


def test_the_document_is_served_and_lists_every_operation() -> None:
    async def body() -> Any:
        async with Api() as api:
            return await api.get("/openapi.json")

    status, served = run(body())

    assert status == 200
    assert served == json.loads(json.dumps(SCHEMA))
    assert {(each.method, each.path) for each in OPERATIONS} == {
        (method.upper(), path) for path, methods in served["paths"].items() for method in methods
    }


@pytest.fixture(scope="module", params=["agg", "apart"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of its own thread, of aggregated workers or of prefill and decode workers beside them."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    api = Api(tokens=OnePrompt())

    async def start() -> str:
        await api.__aenter__()
        await api.all_live()
        await api.holds(A, stored(sliding=range(8), whole=range(8)))
        if request.param == "apart":
            api.enter(entry_of(11, mode="prefill"), entry_of(21, mode="decode"))
        return api.url

    yield asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    asyncio.run_coroutine_threadsafe(api.__aexit__(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def has_float(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(has_float, value.values()))
    return any(map(has_float, value)) if isinstance(value, list) else isinstance(value, float)


def names_a_worker(body: Any) -> bool:
    """Or one of its ranks: the document cannot say which there are."""
    return isinstance(body, dict) and any(
        body.get(field) is not None for fields in NVEXT.values() for field in fields
    )


def is_text(body: Any) -> bool:
    """A prompt as text: of the workers here there is no tokenizer."""
    return isinstance(body, dict) and body.get("prompt") is not None and body.get("token_ids") is None


@pytest.mark.parametrize("operation", [each.name for each in OPERATIONS])
def test_made_up_requests_get_what_the_document_says(url: str, operation: str) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="of the test extra: pip install -e '.[test]'")
    from hypothesis import HealthCheck, given
    from schemathesis import checks

    schema = schemathesis.openapi.from_dict(SCHEMA)
    schema.config.update(base_url=url)
    (described,) = schema.include(operation_id=operation).get_all_operations()

    modes = list(schemathesis.GenerationMode)
    if "requestBody" not in described.ok().definition.raw and not described.ok().query:
        modes.remove(schemathesis.GenerationMode.NEGATIVE)  # nothing in it could be wrong
    for mode in modes:

        @given(case=described.ok().as_strategy(generation_mode=mode))
        @examples(20, suppress_health_check=list(HealthCheck))
        def ask(case: Any) -> None:
            response = case.call()
            # To JSON Schema 1.0 is an integer, to this server it is not.
            unless = [checks.positive_data_acceptance] if has_float(case.body) else []
            if response.status_code == 400 and (names_a_worker(case.body) or is_text(case.body)):
                unless.append(checks.positive_data_acceptance)
            if response.status_code == 503:  # documented, and no fault: nobody may serve it now
                unless.append(checks.not_a_server_error)
            case.validate_response(response, excluded_checks=unless)

        ask()
