"""YAML by the 1.2 core rules, with the line of every key.

PyYAML reads YAML 1.1, where `5e-6` is a word and `off` is false. Only its parser is used here; what a plain
word means is decided by the table of YAML 1.2.2, section 10.3.2. The keys of a mapping are always text, and a key
that stands twice is an error. `dump` writes what both 1.1 and 1.2 readers understand alike, so a program of the
user's own that opens a resolved config with plain PyYAML sees the same values.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError

KeyPath = tuple[str, ...]
_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": re.compile(r"null|Null|NULL|~|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
                        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}


@dataclass
class Document:
    """A parsed file: its values, and for each key path (list indices as text) its `file:line`."""

    name: str
    data: Any
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where the key stands; for a key that is not there, where its nearest parent does."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)


def scalar(text: str) -> Any:
    """What an unquoted word means: None, bool, int, float, or the word itself."""
    for kind, pattern in _CORE.items():
        if pattern.fullmatch(text):
            return _MAKE[kind](text)
    return text


def parse(text: str, name: str) -> Document:
    """Raises ConfigError with file and line: not YAML, several documents, a doubled or structured key, a tag."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"not valid YAML: {error.problem or error.context}", place) from None
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise ConfigError(f"not valid YAML: {error}".replace("\n", " "), name) from None
    document = Document(name, None)
    if root is not None:
        document.data = _Builder(document).build(root, ())
    return document


def read(path: Path) -> Document:
    """Raises ConfigError when the file cannot be read, is not UTF-8 or is not YAML."""
    try:
        return parse(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 (byte {error.start})", str(path)) from None


def dump(data: Any) -> str:
    """Block YAML, keys in their order; `parse(dump(x)).data == x` for what JSON can hold, and inf and nan."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


class _Builder:
    """Turns PyYAML's nodes into values and notes the line of each."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.open: list[yaml.Node] = []  # an alias to a node that is still open would never end

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.document.places.setdefault(path, self._line(node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if any(node is other for other in self.open):
            raise ConfigError("an alias inside what it names", self._line(node), ".".join(path))
        self.open.append(node)
        build = self._mapping if isinstance(node, yaml.MappingNode) else self._sequence
        value = build(node, path)
        self.open.pop()
        return value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        self._expect_tag(node, "map")
        result: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError("a key must be one word", self._line(key), ".".join(path) or None)
            below = (*path, key.value)
            if key.value in result:
                first = self.document.places[below]
                raise ConfigError("this key stands here twice", self._line(key), ".".join(below),
                                  hint=f"the first one: {first}")
            self.document.places[below] = self._line(key)
            result[key.value] = self.build(value, below)
        return result

    def _sequence(self, node: yaml.SequenceNode, path: KeyPath) -> list[Any]:
        self._expect_tag(node, "seq")
        return [self.build(item, (*path, str(index))) for index, item in enumerate(node.value)]

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return node.value
        pattern = _CORE.get(kind)
        if pattern is None:
            raise ConfigError(f"the tag {node.tag} has no meaning here", self._line(node), value=node.value)
        if not pattern.fullmatch(node.value):
            raise ConfigError(f"is not {kind}, as its tag says", self._line(node), value=node.value)
        return _MAKE[kind](node.value)

    def _expect_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != _TAG + kind:
            raise ConfigError(f"the tag {node.tag} has no meaning here", self._line(node))

    def _line(self, node: yaml.Node) -> str:
        return f"{self.document.name}:{node.start_mark.line + 1}"


def _make_int(text: str) -> int:
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _make_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_MAKE = {"null": lambda text: None, "bool": lambda text: text.lower() == "true",
         "int": _make_int, "float": _make_float}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either version of YAML would read as something else."""

    yaml_implicit_resolvers = {first: list(rules)
                               for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _pattern in _CORE.items():
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(_TAG + _kind, _whole, None)
    _Dumper.add_implicit_resolver(_TAG + _kind, _whole, None)
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))
