"""Option files of users, YAML or JSON: read within bounds, with no key twice, refused in one line.

Every file or text of options goes through here: engine options, options laid over them, options of plugins.
Size, depth and number of values are bounded before Python objects are built, so that a small file cannot ask
for much memory (through aliases of aliases) or end the program (by its depth).
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vswa_plugin.errors import ConfigError, one_line, shown

#: An option file of some hundred options has a few KiB.
MAX_BYTES = 1 << 20
MAX_DEPTH = 32
#: Values in the file as it is written, and with every alias replaced by what it stands for.
MAX_VALUES, MAX_EXPANDED = 50_000, 500_000
#: Of a whole number: no option is larger than an unsigned integer of 64 bits.
MAX_NUMBER = 2**64
#: Characters of a whole number in YAML, to any of its bases: the time to read one grows with their square.
_MAX_DIGITS = 256

_OPTIONS = "a mapping of option names"
_MERGE = "tag:yaml.org,2002:merge"


class _Refused(ValueError):
    """Why a text cannot be taken, without the place that it comes from."""


def read_options(path: str, where: str, holds: str = _OPTIONS) -> dict[str, Any]:
    """The mapping in a YAML file, or in a JSON file where its name ends in ``.json``; empty for no content.

    :param where: the option or variable that names the file, for messages; ``holds``: what it should hold.
    :raises ConfigError: names the file, the line or key, and what was expected.
    """
    text = _read(path, where)
    kind, load = ("JSON", _load_json) if path.endswith(".json") else ("YAML", _load_yaml)
    try:
        loaded = load(text) if text.strip() else None
    except _Refused as error:
        raise ConfigError(f"{where}: {path}: expected a {kind} file, got {one_line(str(error))}") from None
    return _mapping(f"{where} {path}", holds, {} if loaded is None else loaded)


def json_options(text: str, where: str, example: str) -> dict[str, Any]:
    """The same for the text of a JSON object.

    :param example: what one looks like, for messages.
    """
    try:
        if len(text) > MAX_BYTES:
            raise _Refused(f"{len(text)} characters, more than {MAX_BYTES}")
        loaded = _load_json(text)
    except _Refused as error:
        reason = one_line(str(error))
        raise ConfigError(
            f"{where}: expected a JSON object such as '{example}', got {shown(text)}: {reason}"
        ) from None
    return _mapping(where, _OPTIONS, loaded)


def json_or_text(text: str) -> object:
    """The value of ``text`` where it is JSON, else the text itself.

    :raises ConfigError: JSON beyond the bounds, or with a key twice.
    """
    try:
        return _load_json(text)
    except _NotJson:
        return text
    except _Refused as error:
        raise ConfigError(f"expected a JSON value or a text, got {shown(text)}: {error}") from None


def _read(path: str, where: str) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{where}: expected a file of at most {MAX_BYTES} bytes, got more in {path}")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: expected text in UTF-8 in {path}, got a byte {data[error.start]:#x} at {error.start}"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{where}: expected a YAML or JSON file at {one_line(path)}, got {reason}"
        ) from error


def _mapping(where: str, holds: str, loaded: object) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise ConfigError(f"{where}: expected {holds}, got {type(loaded).__name__}")
    for key in loaded:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: expected {holds}, got the key {shown(key)}, which is no text")
    return loaded


# -- JSON ------------------------------------------------------------------------------------------------


class _NotJson(_Refused):
    """The text is no JSON at all."""


def _load_json(text: str) -> object:
    try:
        loaded: object = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_no_number,
            parse_int=_integer,
            parse_float=_finite,
        )
    except RecursionError:
        raise _Refused(_too_deep()) from None
    except json.JSONDecodeError as error:
        raise _NotJson(str(error)) from None
    except ValueError as error:
        raise error if isinstance(error, _Refused) else _NotJson(str(error)) from None
    _check_bounds(loaded)
    return loaded


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made: dict[str, object] = {}
    for key, value in pairs:
        if key in made:
            raise _Refused(_twice(key))
        made[_whole(key)] = value
    return made


def _no_number(text: str) -> object:
    raise _NotJson(f"{text}, which JSON does not have")


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > len(str(MAX_NUMBER)):
        raise _Refused(_too_large())
    return _bounded(int(text))


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # as 1e999 is read
        raise _Refused(f"{shown(text)}, a number beyond the range of floats")
    return value


def _whole(text: str) -> str:
    """``text``, unless it has half a character in it, which nothing could write anywhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Refused(f"half a character, {text[error.start]!a}, in a text") from None
    return text


def _bounded(value: int) -> int:
    if abs(value) > MAX_NUMBER:
        raise _Refused(_too_large())
    return value


def _check_bounds(loaded: object) -> None:
    """Refuse what is too deep or too much, and halves of characters; without recursion."""
    level, count = [loaded], 0
    for _ in range(MAX_DEPTH):
        count += len(level)
        if count > MAX_VALUES:
            raise _Refused(f"more than {MAX_VALUES} values")
        for value in level:
            if isinstance(value, str):
                _whole(value)
        level = [below for value in level for below in _below(value)]
        if not level:
            return
    raise _Refused(_too_deep())


def _below(value: object) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep() -> str:
    return f"more than {MAX_DEPTH} levels"


def _too_large() -> str:
    return f"a whole number beyond {MAX_NUMBER}"


def _twice(key: object) -> str:
    return f"the key {shown(key)} twice in one mapping: keep one of them"


# -- YAML ------------------------------------------------------------------------------------------------


def _load_yaml(text: str) -> object:
    import yaml  # only where there is a file

    class Loader(yaml.SafeLoader):
        """Counts depth and values while nodes are composed; a class of its own, as yaml is imported late."""

        depth = values = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            self.values += 1
            if self.depth > MAX_DEPTH:
                raise _Refused(_too_deep())
            if self.values > 2 * MAX_VALUES:  # keys are composed as nodes too
                raise _Refused(f"more than {MAX_VALUES} values")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def flatten_mapping(self, node: Any) -> None:
            """Put merged keys into ``node``, its own ones and those of earlier sources first.

            PyYAML 6.0.4 itself takes an old value where a merged mapping has merged another one.
            """
            pairs = {(key.tag, key.value): (key, value) for key, value in node.value if key.tag != _MERGE}
            for value in [value for key, value in node.value if key.tag == _MERGE]:
                for source in value.value if value.id == "sequence" else [value]:
                    if source.id != "mapping":
                        line = source.start_mark.line + 1
                        raise _Refused(f"line {line}: expected a mapping to merge, got a {source.id}")
                    self.flatten_mapping(source)
                    for key, merged in source.value:
                        pairs.setdefault((key.tag, key.value), (key, merged))
            node.value = list(pairs.values())

    def integer(loader: Loader, node: Any) -> int:
        if len(node.value) > _MAX_DIGITS:
            raise _Refused(_too_large())
        return _bounded(loader.construct_yaml_int(node))

    def number(loader: Loader, node: Any) -> float:
        value: float = loader.construct_yaml_float(node)
        if math.isinf(value) and "inf" not in node.value.lower():
            raise _Refused(f"{shown(node.value)}, a number beyond the range of floats")
        return value

    Loader.add_constructor("tag:yaml.org,2002:int", integer)
    Loader.add_constructor("tag:yaml.org,2002:float", number)
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Graph(loader).check(node)
        loaded: object = loader.construct_document(node)
        return loaded
    except yaml.MarkedYAMLError as error:
        parts = ((error.context, error.context_mark), (error.problem, error.problem_mark))
        raise _Refused(", ".join(_placed(text, mark) for text, mark in parts if text)) from None
    except yaml.YAMLError as error:  # a control character, which no file of text has
        raise _Refused(str(error)) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML raises these for a value that its tag or its form does not fit, such as the date 2026-99-99.
        if isinstance(error, _Refused):
            raise
        raise _Refused(f"a value that cannot be read: {type(error).__name__}: {error}") from None


def _placed(text: str, mark: Any) -> str:
    return text if mark is None else f"{text} (line {mark.line + 1}, column {mark.column + 1})"


class _Graph:
    """The composed nodes of one document, in which aliases lead to nodes that were there before."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        #: Node -> its values and its depth with every alias followed; None: it is being looked at.
        self._sizes: dict[int, tuple[int, int] | None] = {}

    def check(self, node: Any) -> None:
        """Refuse keys given twice, rings of aliases, and what is too large once these are followed."""
        self._size(node)

    def _size(self, node: Any) -> tuple[int, int]:
        line = f"line {node.start_mark.line + 1}"
        known = self._sizes.get(id(node), ())
        if known is None:
            raise _Refused(f"{line}: a value that holds itself through an alias")
        if known:
            return known
        self._sizes[id(node)] = None
        size, depth = 1, 1
        for below in self._values(node):
            below_size, below_depth = self._size(below)
            size, depth = size + below_size, max(depth, below_depth + 1)
        if size > MAX_EXPANDED:
            raise _Refused(f"{line}: more than {MAX_EXPANDED} values once its aliases are followed")
        if depth > MAX_DEPTH:
            raise _Refused(f"{line}: {_too_deep()} once its aliases are followed")
        self._sizes[id(node)] = size, depth
        return size, depth

    def _values(self, node: Any) -> list[Any]:
        if node.id == "scalar":
            _whole(node.value)
        if node.id == "mapping":
            self._check_keys(node)
            return [value for _, value in node.value]
        return list(node.value) if node.id == "sequence" else []

    def _check_keys(self, node: Any) -> None:
        seen: set[Hashable] = set()
        for key, _ in node.value:
            line = f"line {key.start_mark.line + 1}: "
            if key.id != "scalar":
                raise _Refused(f"{line}expected a name as key, got a {key.id}")
            _whole(key.value)
            name = key.value if key.tag == _MERGE else self._loader.construct_object(key)
            if name in seen:
                raise _Refused(f"{line}{_twice(name)}")
            seen.add(name)
