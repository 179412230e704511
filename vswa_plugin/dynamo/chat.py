"""What Dynamo's frontend needs of a model's directory to serve chat; measured with 1.6.1.

Where something of it lacks, a model that is shown for chat never appears, not even for completions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vswa_plugin.errors import ConfigError
from vswa_plugin.files import read_bounded, read_json_object

TOKENIZER_CONFIG = "tokenizer_config.json"
#: Files that hold nothing but the template, beside the key ``chat_template`` of the file above.
TEMPLATE_JINJA, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
_KEY = "chat_template"


def chat_obstacle(model_dir: str | Path) -> str | None:
    """Why the model in ``model_dir`` cannot be served for chat, in one sentence; None where it can.

    A GGUF file has what it takes once it is converted: a path that is no directory has no obstacle.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        return None
    path = directory / TOKENIZER_CONFIG
    try:
        config = read_json_object(path)
    except FileNotFoundError:
        return f"expected {path} for chat, got no such file"
    except ConfigError as error:
        return str(error)
    template = config.get(_KEY)
    if template and not isinstance(template, str):
        # As some old checkpoints have it, by name; the frontend answers each request with 400.
        return f"{path}: {_KEY}: expected one template as a text, got {type(template).__name__}"
    if template or _separate_template(directory):
        return None
    return f"expected a {_KEY} in {path}, or {TEMPLATE_JINJA} or {TEMPLATE_JSON} beside it, got none"


def chat_template(model_dir: Path) -> tuple[str, dict[str, Any]]:
    """The template of a model without an obstacle, and its tokenizer's configuration.

    :raises ConfigError: a file cannot be read.
    """
    config = read_json_object(model_dir / TOKENIZER_CONFIG)
    if isinstance(template := config.get(_KEY), str) and template:
        return template, config
    jinja = model_dir / TEMPLATE_JINJA
    if jinja.is_file():
        return read_bounded(jinja, "a chat template").decode(), config
    return str(read_json_object(model_dir / TEMPLATE_JSON)[_KEY]), config


def _separate_template(directory: Path) -> bool:
    if (directory / TEMPLATE_JINJA).is_file():
        return True
    try:
        return bool(read_json_object(directory / TEMPLATE_JSON).get(_KEY))
    except (FileNotFoundError, ConfigError):
        return False
