"""The tokens of a prompt as Dynamo's frontend makes them: by the model's own tokenizer and chat template."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from vswa_plugin.dynamo.chat import chat_obstacle, chat_template
from vswa_plugin.errors import ConfigError, one_line
from vswa_plugin.files import parse_json, read_bounded

TOKENIZER = "tokenizer.json"
#: What a template may name besides its own variables.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_STEP = "give --token-ids"


def text_of(file: str) -> str:
    """The text in ``file``, or on standard input for ``-``; raises ConfigError where it is none."""
    try:
        return sys.stdin.read() if file == "-" else read_bounded(file, "a prompt").decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--file: expected text in UTF-8 in {file}, got {error}") from error


def messages_of(text: str, is_json: bool) -> list[dict[str, Any]]:
    """The messages of a chat: one of the user, or the list in ``text``, as ``messages`` of a request.

    :raises ConfigError: there is no such list.
    """
    if not is_json:
        return [{"role": "user", "content": text}]
    found = parse_json(text, "--file", "messages of a chat")
    if isinstance(found, dict):
        found = found.get("messages")
    if not isinstance(found, list) or not all(isinstance(each, dict) and "role" in each for each in found):
        raise ConfigError("--file: expected a JSON list of messages, each with its role, got something else")
    return found


def chat_text(model_dir: Path, messages: list[dict[str, Any]]) -> str:
    """The prompt that the model's chat template makes of ``messages``.

    :raises ConfigError: the model has no template, or the template refuses them.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if (obstacle := chat_obstacle(model_dir)) is not None:
        raise ConfigError(f"--chat: {obstacle}")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
    template, config = chat_template(model_dir)
    special = {name: token for name in _SPECIAL_TOKENS if (token := _token(config.get(name))) is not None}
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, tools=None, **special
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = one_line(str(error))
        raise ConfigError(f"--chat: the chat template in {model_dir} refuses this: {reason}") from error


def tokens_of(model_dir: Path, text: str) -> list[int]:
    """The token ids of ``text``, to which nothing is added; raises ConfigError without a tokenizer."""
    from tokenizers import Tokenizer

    path = model_dir / TOKENIZER
    if not path.is_file():
        raise ConfigError(f"expected the model's tokenizer at {path}, got nothing there; {_STEP}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise ConfigError(f"{path}: expected a tokenizer, got: {str(error)[:200]}; {_STEP}") from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _token(value: object) -> str | None:
    """A special token as a configuration has it: its text, or an object with it."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
