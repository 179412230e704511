"""``vswa explain``: where its prompt comes from, and what is no prompt."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.registry_helpers import entry
from vswa_plugin.cli.explain import _tokens
from vswa_plugin.errors import ConfigError
from vswa_plugin.files import MAX_JSON_BYTES


def tokens(model: Path, **given: Any) -> list[int]:
    chosen = {"prompt": None, "file": None, "token_ids": None, "chat": False, **given}
    return _tokens(argparse.Namespace(**chosen), msgspec.structs.replace(entry(0), model_path=str(model)))


def test_words_are_tokens_by_the_models_own_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("Once upon a time")

    assert (
        tokens(model_dir, prompt="Once upon a time") == tokens(model_dir, file=str(tmp_path / "prompt")) != []
    )


@pytest.mark.parametrize(
    "content", ["{}", "[" * 10_000, "\0", '{"model": {"type": "BPE", "vocab": {"a": -1}}}']
)
def test_a_damaged_tokenizer_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)

    with pytest.raises(
        ConfigError, match=r"tokenizer.json: expected a tokenizer, got: .*give --token-ids"
    ) as error:
        tokens(tmp_path, prompt="Once")
    assert len(str(error.value)) < 600


def test_a_prompt_beyond_the_bound_is_refused(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    with file.open("wb") as out:
        out.truncate(MAX_JSON_BYTES + 1)

    with pytest.raises(ConfigError, match="prompt: expected a prompt of at most"):
        tokens(model_dir, file=str(file))


@pytest.mark.parametrize("given", ["1,x", "9" * 5_000, "1," * 10 + "x" * 10_000, str(1 << 32)])
def test_what_are_no_token_ids_is_refused_in_a_short_line(tmp_path: Path, given: str) -> None:
    with pytest.raises(ConfigError, match="--token-ids: expected numbers from 0") as error:
        tokens(tmp_path, token_ids=given)
    assert len(str(error.value)) < 400


def test_a_chat_is_one_message_or_a_list_of_them(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}))
    plain, chat = tokens(model_dir, prompt="Hello"), tokens(model_dir, prompt="Hello", chat=True)

    assert chat == tokens(model_dir, file=str(tmp_path / "chat.json"), chat=True)
    assert any(plain == chat[at : at + len(plain)] for at in range(len(chat))) and len(chat) > len(plain)


@pytest.mark.parametrize("content", ["[]x", '{"role": "user"}', '["Hello"]', '[{"content": "x"}]', "7"])
def test_what_are_no_messages_is_refused(model_dir: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "chat.json").write_text(content)

    with pytest.raises(ConfigError, match=r"--file: expected (a JSON list of|messages)"):
        tokens(model_dir, file=str(tmp_path / "chat.json"), chat=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this: roles must alternate"),
        ("{% for x in %}", "refuses this: "),
        ("{{ ''.__class__.__mro__ }}", "refuses this: "),
        (None, "expected a chat_template in"),
    ],
)
def test_a_template_that_cannot_be_used_is_said(
    model_dir: Path, tmp_path: Path, template: str | None, message: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    config = {} if template is None else {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match="--chat: ") as error:
        tokens(tmp_path, prompt="Hello", chat=True)
    assert message in str(error.value)
