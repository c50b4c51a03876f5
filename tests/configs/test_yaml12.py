"""Words mean what YAML 1.2 says, errors have a line, and what is written is read the same by both versions of YAML."""
from __future__ import annotations

import math

import pytest
import yaml

from configs.errors import ConfigError
from configs.yaml12 import dump, parse, read


@pytest.mark.parametrize(("word", "meaning"), [
    ("5e-6", 5e-6), ("1e3", 1000.0), (".5", 0.5), ("1.", 1.0), ("-.inf", -math.inf), ("+1.5E+2", 150.0),
    ("off", "off"), ("yes", "yes"), ("n", "n"), ("True", True), ("FALSE", False), ("tRUE", "tRUE"),
    ("010", 10), ("0o17", 15), ("0x1F", 31), ("0b1", "0b1"), ("1_000", "1_000"), ("+3", 3), ("12:30:00", "12:30:00"),
    ("2024-01-01", "2024-01-01"), ("~", None), ("", None), ("Null", None), ("nil", "nil"), ("'5'", "5"), ('"off"', "off"),
    ("!!str 5", "5"), ("!!float 5", 5.0), ("<<", "<<"), ("=", "="),
])
def test_words_mean_what_yaml_1_2_says(word: str, meaning: object) -> None:
    value = parse(f"key: {word}\n", "x.yaml").data["key"]
    assert value == meaning and type(value) is type(meaning)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse("[.nan]", "x.yaml").data[0])


def test_keys_are_text_and_know_their_lines() -> None:
    document = parse("05: a\noff:\n  - x\n  - {deep: 1}\n", "dir/x.yaml")
    assert document.data == {"05": "a", "off": ["x", {"deep": 1}]}
    assert document.place(("off", "1", "deep")) == "dir/x.yaml:4"
    assert document.place(("off", "1", "missing", "deeper")) == "dir/x.yaml:4"
    assert document.place(("nowhere",)) == "dir/x.yaml:1"


@pytest.mark.parametrize(("text", "line", "said"), [
    ("a: 1\nb:\n  c: 1\n  c: 2\n", 4, "twice"),
    ("a: 1\nb: [1, 2\n", 3, "not valid YAML"),
    ("a: 1\n---\nb: 2\n", 2, "another document"),
    ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
    ("a: !!python/object:os.system x\n", 1, "no meaning here"),
    ("a: !!int x\n", 1, "is not int"),
    ("x: 1\na: &a\n  - *a\n", 2, "alias"),
    ("? [a]\n: 1\n", 1, "one word"),
])
def test_an_error_has_file_and_line(text: str, line: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse(text, "runs/x.yaml")
    assert caught.value.where == f"runs/x.yaml:{line}"
    assert "\n" not in str(caught.value).partition("\n  ")[0]


def test_unreadable_files_are_named(tmp_path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    (tmp_path / "control.yaml").write_bytes(b"a: \x01\n")
    for name, said in (("latin.yaml", "UTF-8"), ("control.yaml", "not valid YAML"), ("none.yaml", "No such file")):
        with pytest.raises(ConfigError, match=said) as caught:
            read(tmp_path / name)
        assert name in str(caught.value)


def test_what_is_written_is_read_the_same_by_both_versions() -> None:
    words = ["off", "y", "5e-6", "1e3", "0o17", "0b1", "1_000", "2024-01-01", "12:30", "=", "<<", "~", "", "null", ".nan",
             " x", "x ", "a: b", "a #b", "'", '"', "a\nb", "a\tb", "생쥐", "😀", "- a", "!x", "&a", "*b", "`", "{", "[a", "|",
             "\u2028", "\x07", "\udc80", "a'; echo foo", "$HOME"]
    numbers = [5e-6, 1e16, 0.1, 1e300, -3, 10, True, None, math.inf, -math.inf]
    data = {"words": words, "numbers": numbers, "keys": {word: 1 for word in words}, "empty": [{}, []], "5e-6": {"off": 1}}
    text = dump(data)
    assert parse(text, "x").data == data
    assert yaml.safe_load(text) == data
    assert dump(parse(text, "x").data) == text
