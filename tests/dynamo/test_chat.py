"""What a model's directory must hold for chat: said before a worker serves, not by a 404."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vswa_plugin.dynamo.chat import chat_obstacle

TEMPLATE = "{{ messages[0].content }}"


def directory(path: Path, config: object | None = None, **files: str) -> Path:
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / name.replace("_dot_", ".")).write_text(content)
    return path


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"chat_template": TEMPLATE}, {}),
        ({}, {"chat_template_dot_jinja": TEMPLATE}),
        ({}, {"chat_template_dot_json": json.dumps({"chat_template": TEMPLATE})}),
    ],
    ids=["in the tokenizer's configuration", "jinja", "json"],
)
def test_a_template_in_any_of_three_places_is_enough(
    tmp_path: Path, config: object, files: dict[str, str]
) -> None:
    assert chat_obstacle(directory(tmp_path, config, **files)) is None


@pytest.mark.parametrize(
    ("config", "files", "said"),
    [
        (None, {"chat_template_dot_jinja": TEMPLATE}, "expected .*tokenizer_config.json for chat"),
        ({}, {}, "expected a chat_template in .*tokenizer_config.json, or chat_template.jinja or "),
        ({"chat_template": ""}, {}, "expected a chat_template"),
        ({}, {"chat_template_dot_json": "{"}, "expected a chat_template"),
        ([], {}, "expected a JSON object, got list"),
        (
            {"chat_template": [{"name": "default", "template": TEMPLATE}]},
            {},
            "one template as a text, got list",
        ),
    ],
    ids=["no configuration", "no template", "an empty one", "a damaged file", "a list", "several templates"],
)
def test_what_lacks_is_named_with_its_file(
    tmp_path: Path, config: object | None, files: dict[str, str], said: str
) -> None:
    obstacle = chat_obstacle(directory(tmp_path, config, **files))

    assert obstacle is not None
    assert re.search(said, obstacle)


def test_a_file_such_as_gguf_is_left_to_its_conversion(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")

    assert chat_obstacle(tmp_path / "m.gguf") is None
