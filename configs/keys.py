"""Schemas as trees of keys: which keys there are, which hold paths, which one was probably meant; and typed
decoding with errors that name file:line, key path, value and the nearest known key."""
from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from configs.errors import NO_VALUE, ConfigError
from configs.fields import Strict
from configs.yaml12 import Document, KeyPath

S = TypeVar("S", bound=Strict)
_WORDS = {"object": "a mapping of keys", "array": "a list", "str": "text", "int": "a whole number",
          "float": "a number", "bool": "true or false", "null": "nothing"}
_GOT = {"object": dict, "array": list, "str": str, "int": int, "float": float, "bool": bool,
        "null": type(None)}
_KINDS = {inspect.IntType: "a whole number", inspect.VarTupleType: "a list"}
_AT = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?", re.DOTALL)
_NO_PATH = re.compile(r"random:\d+|hub:[^/]+/[^/]+|\$\{[^{}]+\}")  # random weights; what another job will give


def decode(document: Document, schema: type[S], at: KeyPath = ()) -> S:
    """The value at `at` of a document as its type. Raises ConfigError."""
    value = look_up(document.data, at)
    value = {} if value is None or value is NO_VALUE else value
    _check_unknown(document, value, _info(schema), schema, at)
    _check_finite(document, value, at)
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise _explain(str(error), document, schema, value, at) from None


def look_up(data: Any, path: KeyPath) -> Any:
    """The value at a key path (list indices as text); NO_VALUE where there is none."""
    for key in path:
        if isinstance(data, dict) and key in data:
            data = data[key]
        elif isinstance(data, list) and key.isdecimal() and int(key) < len(data):
            data = data[int(key)]
        else:
            return NO_VALUE
    return data


def known_keys(schema: type[Strict]) -> list[str]:
    """All keys of a schema as dotted paths, groups included."""
    return [".".join(path) for path, _ in _walk(_info(schema), ())]


def has_key(schema: type[Strict], path: KeyPath) -> bool:
    return _type_at(schema, path) is not None


def wants_text(schema: type[Strict], path: KeyPath) -> bool:
    """Is the key's value always text (or null)? Then a --set value is taken as it stands."""
    kinds = [kind for kind in _alternatives(_type_at(schema, path)) if not isinstance(kind, inspect.NoneType)]
    return bool(kinds) and all(
        isinstance(kind, inspect.StrType)
        or isinstance(kind, inspect.LiteralType) and all(isinstance(value, str) for value in kind.values)
        for kind in kinds)


def path_keys(schema: type[Strict], data: dict[str, Any]) -> tuple[str, ...]:
    """The dotted keys that are typed as paths and hold one (`random:SEED` in place of weights is none, nor
    `${phase1.checkpoints.best}`)."""
    return tuple(".".join(path) for path, kind in _walk(_info(schema), ())
                 if _is_path(kind) and holds_path(look_up(data, path)))


def holds_path(value: Any) -> bool:
    return isinstance(value, str) and not _NO_PATH.fullmatch(value)


def nearest_hint(key: str, known: list[str]) -> str | None:
    """`nearest: a.b.c`: the same last word elsewhere, else a similar sibling, else a similar one anywhere."""
    parent, _, last = key.rpartition(".")
    by_last: dict[str, list[str]] = {}
    for other in known:
        by_last.setdefault(other.rpartition(".")[2], []).append(other)
    siblings = [other for other in known if other.rpartition(".")[0] == parent]
    found = by_last.get(last) or difflib.get_close_matches(key, siblings, 1) or [
        by_last[word][0] for word in difflib.get_close_matches(last, by_last, 1)]
    if found:
        return f"nearest: {found[0]}"
    return f"known here: {', '.join(sorted(siblings))}" if siblings else None


@cache
def _info(schema: type[Strict]) -> inspect.Type:
    return inspect.type_info(schema)


def _alternatives(kind: inspect.Type | None) -> list[inspect.Type]:
    if isinstance(kind, inspect.Metadata):
        return _alternatives(kind.type)
    if isinstance(kind, inspect.UnionType):
        return [one for member in kind.types for one in _alternatives(member)]
    return [] if kind is None else [kind]


def _is_path(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.UnionType):
        return any(_is_path(member) for member in kind.types)
    return isinstance(kind, inspect.Metadata) and bool((kind.extra or {}).get("path"))


def _struct(kind: inspect.Type | None) -> inspect.StructType | None:
    return next((one for one in _alternatives(kind) if isinstance(one, inspect.StructType)), None)


def _walk(kind: inspect.Type, path: KeyPath) -> Iterator[tuple[KeyPath, inspect.Type]]:
    struct = _struct(kind)
    for one in struct.fields if struct else ():
        below = (*path, one.encode_name)
        yield below, one.type
        yield from _walk(one.type, below)


def _type_at(schema: type[Strict], path: KeyPath, entries: bool = False) -> inspect.Type | None:
    """`entries`: also of what stands in a list."""
    kind: inspect.Type | None = _info(schema)
    for key in path:
        lists = [one for one in _alternatives(kind) if isinstance(one, inspect.CollectionType)]
        if entries and lists:
            kind = lists[0].item_type
            continue
        struct = _struct(kind)
        mapping = next((one for one in _alternatives(kind) if isinstance(one, inspect.DictType)), None)
        if struct:
            kind = next((one.type for one in struct.fields if one.encode_name == key), None)
        else:
            kind = mapping.value_type if mapping else None
    return kind


def _check_unknown(document: Document, value: Any, kind: inspect.Type, schema: type[Strict], at: KeyPath,
                   path: KeyPath = ()) -> None:
    struct = _struct(kind)
    if struct is None or not isinstance(value, dict):
        return
    types = {one.encode_name: one.type for one in struct.fields}
    for key, item in value.items():
        below = (*path, key)
        if key in types:
            _check_unknown(document, item, types[key], schema, at, below)
        elif key != struct.tag_field:
            raise ConfigError("there is no such key", document.place((*at, *below)), ".".join((*at, *below)),
                              _shown(item), nearest_hint(".".join(below), known_keys(schema)))


def _check_finite(document: Document, value: Any, path: KeyPath) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError("expected a finite number", document.place(path), ".".join(path), value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _check_finite(document, item, (*path, str(key)))


def _explain(message: str, document: Document, schema: type[Strict], value: Any, at: KeyPath) -> ConfigError:
    """msgspec's `Expected ... - at `$.a.b`` as a ConfigError."""
    match = _AT.fullmatch(message)
    what, path = match["what"], _split(match["path"] or "", value, match["what"])
    hint = None
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        what, path = "is missing", (*path, missing[1])
    elif named := re.match(r"`([\w.]+)`: (.*)", what, re.DOTALL):
        what, path = named[2], (*path, *named[1].split("."))
    elif what.startswith("Invalid enum value"):
        what = f"must be {_choices(_type_at(schema, path, entries=True))}"
    elif what.startswith("Expected"):
        if re.match(r"Expected `str( \| null)?`, got `(int|float|bool)`", what):
            hint = "if it is meant as text, put it in quotes"
        what = re.sub(r"`([a-z |]+)`", _say, what).replace("Expected", "expected", 1)
    whole = (*at, *path)
    shown = _shown(look_up(document.data, whole))
    return ConfigError(what, document.place(whole), ".".join(whole) or None, shown, hint)


def _split(path: str, value: Any, what: str) -> KeyPath:
    """`.a.b[0][...]` as keys; `[...]` is the first entry of the kind that msgspec did not want."""
    keys: list[str] = []
    for key in re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path):
        word = key[0] or key[1]
        if word == "...":
            got = re.search(r"got `(\w+)`", what)
            items = look_up(value, tuple(keys))
            word = next((name for name, item in items.items() if got and type(item) is _GOT[got[1]]), "…")
        keys.append(word)
    return tuple(keys)


def _say(match: re.Match[str]) -> str:
    return " or ".join(_WORDS.get(word, word) for word in match[1].split(" | "))


def _choices(kind: inspect.Type | None) -> str:
    said: list[str] = []
    for one in _alternatives(kind):
        if isinstance(one, inspect.LiteralType):
            said += [str(value) for value in one.values]
        elif isinstance(one, inspect.StructType):
            said.append("a mapping")
        else:
            said.append(_KINDS.get(type(one), "null"))
    return " or ".join(said)


def _shown(value: Any) -> Any:
    return NO_VALUE if isinstance(value, dict) else value
