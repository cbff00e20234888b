"""YAML text -> plain data, remembering on which line everything stands.

Stricter than YAML 1.1 where its guesses would change a key without a word: ``NO`` (Norway) is not false, ``01234`` (a
postal code) is not an octal number, ``12:30`` is not 750. Such words are strings; ``true``, ``false``, plain decimal
integers, dates and date-times are what they look like.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

#: Where something stands in the document: keys and list positions from the top.
Path: TypeAlias = tuple[str | int, ...]

# Aliases may repeat parts of the document, and repeat the repetitions: a few lines could stand for billions of values.
_MOST_NODES = 500_000
_DEEPEST = 40


@dataclass(frozen=True)
class YamlFault:
    """Something that is not as it should be, and where."""

    path: Path
    message: str


@dataclass(frozen=True)
class YamlDocument:
    """What a text holds.

    :param data: None where the text cannot be read.
    :param lines: path -> line, counted from 1.
    """

    data: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    faults: tuple[YamlFault, ...] = ()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name and form for its class-wide table


_DAY = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_CLOCK = r"[0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]*)?"
_ZONE = r"[ \t]*(?:Z|[-+][0-9]{1,2}(?::[0-9]{2})?)"
_FRACTION = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"

for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("timestamp", rf"{_DAY}(?:[Tt ]{_CLOCK}(?:{_ZONE})?)?", "0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), ["" if char == "\0" else char for char in _first]
    )


def read_yaml(text: str) -> YamlDocument:
    """Read one YAML document. Never raises for bad text: the faults say what is wrong."""
    return _Reader().read(text)


class _Reader:
    def __init__(self) -> None:
        self._lines: dict[Path, int] = {}
        self._faults: list[YamlFault] = []
        self._nodes = 0

    def read(self, text: str) -> YamlDocument:
        try:
            data = self._load(text)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._refuse(f"is not YAML: {error.problem}", None if mark is None else mark.line + 1)
        except yaml.reader.ReaderError as error:
            self._refuse(f"is not YAML: {error.reason}", text.count("\n", 0, error.position) + 1)
        except RecursionError:
            self._refuse("is nested too deeply")
        except ValueError as error:  # such as the date 2024-13-01
            self._refuse(f"is not YAML: {error}")
        else:
            return YamlDocument(data, self._lines, tuple(self._faults))
        return YamlDocument(None, self._lines, tuple(self._faults))

    def _refuse(self, message: str, line: int | None = None) -> None:
        self._lines = {} if line is None else {(): line}
        self._faults = [YamlFault((), message)]

    def _load(self, text: str) -> Any:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                self._faults.append(YamlFault((), "is empty: start with 'format: 1'"))
                return None
            self._note(loader, node, ())
            return None if self._faults else loader.construct_document(node)
        finally:
            loader.dispose()

    def _note(self, loader: _Loader, node: yaml.Node, path: Path) -> None:
        self._nodes += 1
        if self._nodes > _MOST_NODES or len(path) > _DEEPEST:
            raise RecursionError
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            self._note_mapping(loader, node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._note(loader, item, (*path, index))
        else:
            self._note_scalar(loader, node, path)

    def _note_mapping(self, loader: _Loader, node: yaml.MappingNode, path: Path) -> None:
        seen: set[Hashable] = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._lines[path] = key_node.start_mark.line + 1
                self._faults.append(YamlFault(path, "has a key that is not a single value"))
                continue
            key = loader.construct_object(key_node)
            here = (*path, key if isinstance(key, int) else str(key))
            self._lines[here] = key_node.start_mark.line + 1
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                self._faults.append(YamlFault(here, "stands here twice: keep one"))
            seen.add(key)
            self._note(loader, value_node, here)

    def _note_scalar(self, loader: _Loader, node: yaml.Node, path: Path) -> None:
        try:
            loader.construct_object(node)
        except ValueError as error:
            self._faults.append(YamlFault(path, f"{node.value!r} cannot be read: {error}; quote it if it is text"))
