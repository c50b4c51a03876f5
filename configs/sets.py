"""`--set a.b=v`: changes to a run file from the command line, by the same YAML rules and errors."""
from __future__ import annotations

from typing import Any

from configs.errors import NO_VALUE, ConfigError
from configs.fields import ResourcesOverride, Strict
from configs.keys import has_key, known_keys, look_up, nearest_hint, wants_text
from configs.yaml12 import Document, KeyPath, parse, scalar


def apply_sets(
    document: Document, sets: list[str], schema: type[Strict] | None, stage: str,
) -> tuple[str, ...]:
    """Changes `document` in place; the dotted keys that were set. A later --set wins.

    `phase3.a.b=v` is `a.b=v` for the stage phase3. Where the schema wants text the value is taken as it stands
    (one pair of quotes around all of it is removed); elsewhere it is read as YAML. A free-form run file has only
    the keys it has; `+a.b=v` adds one.
    """
    return tuple(_apply(document, argument, schema, stage) for argument in sets)


def _apply(document: Document, argument: str, schema: type[Strict] | None, stage: str) -> str:
    place = f"--set {argument}"
    key, equals, text = argument.partition("=")
    adds = key.startswith("+")
    path = tuple(key.removeprefix("+").split("."))
    if not equals or not all(path):
        raise ConfigError("must be KEY=VALUE, with dots between the words of the key", place,
                          hint="example: --set training.optimizer.lr=5e-6")
    if len(path) > 1 and path[0] == stage and not exists(document, path[:1], schema):
        path = path[1:]
    if not adds and not exists(document, path, schema):
        raise _no_such_key(document, path, schema, place)
    _store(document, path, _value(text, path, schema, place), place)
    return ".".join(path)


def exists(document: Document, path: KeyPath, schema: type[Strict] | None) -> bool:
    """Whether a run file may say something at this key."""
    if schema:
        return has_key(schema, path)
    if path[0] == "resources":
        return len(path) == 1 or has_key(ResourcesOverride, path[1:])
    return look_up(document.data, path) is not NO_VALUE


def _no_such_key(document: Document, path: KeyPath, schema: type[Strict] | None, place: str) -> ConfigError:
    if schema:
        known = known_keys(schema)
    else:
        known = [".".join(other) for other in document.places if other]
    hint = nearest_hint(".".join(path), known)
    if not schema:
        hint = "; ".join(part for part in (hint, f"to add it: --set +{'.'.join(path)}=…") if part)
    return ConfigError("there is no such key", place, ".".join(path), hint=hint)


def _value(text: str, path: KeyPath, schema: type[Strict] | None, place: str) -> Any:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if schema and wants_text(schema, path):
        if quoted:
            return _parse_quoted(text)
        return None if scalar(text) is None else text
    if text[:1] in ("[", "{") or quoted:
        return parse(text, place).data
    return scalar(text)


def _parse_quoted(text: str) -> str:
    """The text in one pair of quotes; `'a' and 'b'` is not quoted as a whole and stays."""
    try:
        value = parse(text, "--set").data
    except ConfigError:
        return text
    return value if isinstance(value, str) else text


def _store(document: Document, path: KeyPath, value: Any, place: str) -> None:
    parent = document.data
    for depth, key in enumerate(path[:-1]):
        below = look_up(parent, (key,))
        if below is NO_VALUE or below is None:
            below = _put(parent, key, {})
        if not isinstance(below, (dict, list)):
            key = ".".join(path[: depth + 1])
            raise ConfigError("is a value and has no keys below it", place, key, below)
        parent = below
    _put(parent, path[-1], value)
    document.places = {other: where for other, where in document.places.items() if other[: len(path)] != path}
    document.places[path] = place


def _put(parent: Any, key: str, value: Any) -> Any:
    parent[int(key) if isinstance(parent, list) else key] = value
    return value
