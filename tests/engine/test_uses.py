"""What becomes of each field of a request: refused by the client's name, or used, or ignored for a reason."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.serving.fields import FIELDS as GEMMA3_CPU
from vswa_plugins.tensorrt_llm.fields import FIELDS as TENSORRT_LLM
from vswa_plugins.vllm.fields import FIELDS as VLLM

from tests.fields_page import page
from vswa_plugin.engine import SHARED, FieldUses, client_name, ignored, refused, used
from vswa_plugin.errors import InvalidRequest
from vswa_plugin.testing.engine import FIELDS as STANDIN

TABLES = {"gemma3_cpu": GEMMA3_CPU, "tensorrt_llm": TENSORRT_LLM, "vllm": VLLM, "standin": STANDIN}


def refusal(request: dict[str, Any], table: FieldUses = GEMMA3_CPU) -> str:
    try:
        table.check(request)
    except InvalidRequest as error:
        return str(error)
    return ""


#: Fields that no engine here serves, as they come, and the names by which clients send them.
NOT_SERVED: list[tuple[dict[str, Any], str]] = [
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"multi_modal_data": {"image_url": [{"Url": "data:x"}]}}, "messages (multi_modal_data)"),
    ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
    ({"media_io_kwargs": {"image": {}}}, "media_io_kwargs"),
    ({"stop_conditions": {"max_thinking_tokens": 5}}, "thinking_token_budget (or nvext.max_thinking_tokens)"),
    ({"sampling_options": {"n": 2}}, "n"),
    ({"sampling_options": {"best_of": 2}}, "best_of"),
    ({"sampling_options": {"use_beam_search": True}}, "use_beam_search"),
    ({"sampling_options": {"length_penalty": 1.5}}, "length_penalty"),
    ({"output_options": {"prompt_logprobs": 0}}, "prompt_logprobs (or echo)"),
    ({"extra_args": {"sampling_options": {"detokenize": False}}}, "detokenize"),
    ({"extra_args": {"sampling_options": {"allowed_token_ids": [4711]}}}, "allowed_token_ids"),
    ({"extra_args": {"sampling_options": {"bad_words_token_ids": [[4711]]}}}, "bad_words_token_ids"),
    ({"extra_args": {"sampling_options": {"logprob_token_ids": [4711]}}}, "logprob_token_ids"),
    ({"extra_args": {"nvext": {"metadata_upload": {"url": "x"}}}}, "nvext.metadata_upload"),
    ({"bootstrap_info": {"bootstrap_room": 1}}, "bootstrap_info"),
    # Not sent by today's frontend; sent by another one, they must not be dropped.
    ({"sampling_options": {"logit_bias": {"4711": 5}}}, "logit_bias"),
    ({"extra_args": {"sampling_options": {"logit_bias": {"4711": 5}}}}, "logit_bias"),
    ({"stop_conditions": {"new_wish": 1}}, "new_wish"),
    ({"output_options": {"new_wish": [1]}}, "new_wish"),
]
GUIDED = {
    "json": ({"type": "object"}, "response_format, tool_choice or guided_json"),
    "regex": ("a", "guided_regex"),
    "choice": (["a"], "guided_choice"),
    "grammar": ("a", "guided_grammar"),
    "structural_tag": ({"type": "x"}, "tools or tool_choice"),
    "backend": ("xgrammar", "guided_decoding_backend"),
    "whitespace_pattern": ("x", "guided_whitespace_pattern"),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("request_", "named"), NOT_SERVED, ids=str)
def test_a_field_that_is_not_served_is_refused_as_the_client_calls_it(
    table: str, request_: dict[str, Any], named: str
) -> None:
    text = refusal(request_, TABLES[table])

    assert text.startswith(f"{named}: expected ")
    assert "4711" not in text, "no token id stands in a refusal"


@pytest.mark.parametrize("kind", GUIDED)
def test_guided_decoding_is_refused_by_what_the_client_may_have_sent(kind: str) -> None:
    value, named = GUIDED[kind]

    asked = {"sampling_options": {"guided_decoding": {kind: value}}}

    assert refusal(asked, STANDIN).startswith(f"{named}: expected none")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"multi_modal_data": None, "sampling_options": None, "routing": {}, "extra_args": None},
        {"sampling_options": {"n": 1, "best_of": 1, "use_beam_search": False, "length_penalty": 1.0}},
        {"sampling_options": {"guided_decoding": {"json": None, "choice": None}}},
        {"extra_args": {"sampling_options": {"detokenize": True}}},
        {"stop_conditions": {"stop": ["x"], "new_wish": None}, "sampling_options": {"new_wish": False}},
        {"mm_processor_kwargs": {}, "annotations": ["token_ids"], "router": {"ttft_target": 1.0}},
    ],
    ids=str,
)
def test_what_means_the_same_as_nothing_is_served(table: str, request_: dict[str, Any]) -> None:
    assert "" == refusal(request_, TABLES[table])


def test_true_is_not_one() -> None:
    assert refusal({"sampling_options": {"n": True}}).startswith("n: expected 1")


def test_a_field_of_a_newer_frontend_that_is_no_wish_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    table = FieldUses({"inner.known": ignored("x")})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            table.check({"new": 1, "inner": {"known": 1, "new": [4711]}, "empty": {}})

    assert ["new", "inner.new"] == [record.args[0] for record in caplog.records if record.args]
    assert "4711" not in caplog.text


def test_the_names_that_are_logged_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        FieldUses({}).check({f"field{number}": 1 for number in range(1_000)})

    assert 100 == len(caplog.records)


def test_a_section_that_is_no_object_is_refused() -> None:
    assert "sampling_options: expected an object, got list" == refusal({"sampling_options": [1]})


def test_a_table_says_three_things_of_a_field() -> None:
    uses = {"a": used("it"), "b": refused("none", 0), "c": ignored("reason")}

    assert "" == refusal({"a": 1, "b": 0, "c": 1}, FieldUses(uses))
    assert "b: expected none, got 1" == refusal({"b": 1}, FieldUses(uses))


def test_what_is_shared_is_never_said_to_be_used() -> None:
    """An engine that takes the shared table promises nothing that it does not do."""
    assert set() == {path for path, use in SHARED.items() if use.use == "used"}


def test_a_field_that_no_client_sends_keeps_its_path() -> None:
    assert "prefill_result.disaggregated_params" == client_name("prefill_result.disaggregated_params")
    assert "max_tokens" == client_name("stop_conditions.max_tokens")


def test_the_page_says_what_the_tables_say() -> None:
    written = (Path(__file__).parents[2] / "docs" / "request-fields.md").read_text("utf-8")

    assert page() == written, "run: python -m tests.fields_page > docs/request-fields.md"
