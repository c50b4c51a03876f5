"""Whose faces and voices there are: four layouts on the disk, and the split by identity.

    folders    faces/NAME.jpg and voices/NAME.wav
    pair list  lines <face>TAB<voice>[TAB<identity>], paths from the list's folder
    JSON       [{"face": …, "voice": …, "identity": …, "gender": …}, …]; the last two may be absent
    VoxCeleb   idNNNNN/faces/… and idNNNNN/voices/…, at any depth

Any face of an identity goes with any of its voices. Who it is says `identity` (a pattern), else the list itself, else a
VoxCeleb name (idNNNNN) in the path, else the folder in folders; else whatever shares a file is one identity.
"""
from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from configs.face_voice import Source, Split
from jobs.runtime import JobError
from jobs.world import mixed_seed

T = TypeVar("T")
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
SOUNDS = frozenset({".wav", ".flac", ".ogg", ".mp3", ".m4a"})
_VOXCELEB = re.compile(r"(?:^|[/_])(id\d{5})(?=[/_.]|$)")
_SHOWN = 5  # names in one message


@dataclass(frozen=True)
class Person:
    """One identity."""

    name: str
    faces: tuple[Path, ...]
    voices: tuple[Path, ...]
    gender: str | None = None

    @property
    def samples(self) -> int:
        """How many pairs an epoch takes of it: every face and every voice at least once."""
        return max(len(self.faces), len(self.voices))


@dataclass(frozen=True)
class People:
    """Identities by name, and what was left out of them, in words."""

    persons: tuple[Person, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        return {person.name for person in self.persons}

    def fingerprint(self) -> str:
        """Of who there is, and the names and sizes of the files."""
        digest = hashlib.sha256()
        for person in self.persons:
            media = (f"{path.name} {path.stat().st_size}" for path in (*person.faces, *person.voices))
            digest.update("\n".join((person.name, *media, "")).encode())
        return digest.hexdigest()

    def at_most(self, media: int) -> People:
        """With so many faces and voices of each, spread evenly over what there is."""
        return People(tuple(replace(person, faces=_spread(person.faces, media), voices=_spread(person.voices, media))
                            for person in self.persons))


@dataclass(frozen=True)
class Parts:
    """`train`, `val` and `test` share nobody; `seen` is of identities in `train`, on media that are not."""

    train: People
    val: People
    test: People
    seen: People


@dataclass(frozen=True)
class _Row:
    face: Path
    voice: Path
    identity: str | None
    gender: str | None = None


def find_people(source: Source) -> People:
    """Everybody in a data set. Raises JobError: nothing there, or a list that cannot be read."""
    if source.voxceleb is not None:
        people = _from_voxceleb(Path(source.voxceleb))
    elif source.pairs is not None:
        path = Path(source.pairs)
        rows = _from_json(path) if path.suffix == ".json" else _from_list(path)
        people = People(_grouped(_identified(rows, source.identity, path.parent)))
    else:
        people = _from_folders(Path(str(source.faces)), Path(str(source.voices)), source.identity)
    if not people.persons:
        raise JobError(f"{source.voxceleb or source.pairs or source.faces}: there is nobody with a face and a voice",
                       "; ".join(people.notes) or "see the layouts in docs/face-voice.md")
    _check_one_owner(people)
    return _with_genders(people, Path(source.genders)) if source.genders else people


def split(people: People, how: Split) -> Parts:
    """Who is on which side is a function of the seed and the name alone. Raises JobError when a side would have fewer
    than two identities."""
    order = sorted(people.persons, key=lambda person: mixed_seed("split", how.seed, person.name))
    val, test = round(how.val * len(order)), round(how.test * len(order))
    if min(val, test) < 2 or len(order) - val - test < 2:
        raise JobError(f"data.split: {len(order)} identities give {len(order) - val - test} to train on, {val} for "
                       f"validation and {test} to test; two of each are needed",
                       "raise data.split.val and data.split.test, or bring more identities")
    sides = [tuple(sorted(side, key=lambda person: person.name))
             for side in (order[val + test:], order[:val], order[val:val + test])]
    train, seen = _hold_back(sides[0], how)
    return Parts(train, People(sides[1]), People(sides[2]), seen)


def check_disjoint(trained: set[str], others: People, what: str, allow_overlap: bool) -> str | None:
    """Raises JobError when an identity of `others` was trained on; allowed, a line that says how many."""
    both = sorted(trained & others.names)
    if not both:
        return None
    said = f"{what}: {len(both)} of {len(others.persons)} identities are trained on too: {some(both)}"
    if not allow_overlap:
        raise JobError(f"{said}; what is measured on them says nothing about strangers",
                       "take them out, or allow it: --set data.allow_overlap=true (by hand: --allow-overlap)")
    return f"note: {said} (allowed)"


def check_enough(people: People, what: str) -> None:
    """Raises JobError."""
    if len(people.persons) < 2:
        raise JobError(f"{what}: {len(people.persons)} identities; it takes two to tell them apart", "name more people")


def some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _hold_back(persons: tuple[Person, ...], how: Split) -> tuple[People, People]:
    """Of each identity with enough of both, `seen` of the faces and of the voices go to the second."""
    train, seen = [], []
    for person in persons:
        faces, voices = (_held(getattr(person, side), how, person.name) for side in ("faces", "voices"))
        if faces and voices:
            seen.append(replace(person, faces=faces, voices=voices))
            person = replace(person, faces=tuple(path for path in person.faces if path not in faces),
                             voices=tuple(path for path in person.voices if path not in voices))
        train.append(person)
    return People(tuple(train)), People(tuple(seen))


def _held(media: tuple[Path, ...], how: Split, name: str) -> tuple[Path, ...]:
    if how.seen == 0 or len(media) < 2:
        return ()
    count = min(len(media) - 1, max(1, round(how.seen * len(media))))
    ordered = sorted(media, key=lambda path: mixed_seed("seen", how.seed, name, path.name))
    return tuple(sorted(ordered[:count]))


def _from_voxceleb(root: Path) -> People:
    persons, lacking = [], []
    for folder in sorted(path for path in _listed(root) if path.is_dir() and re.fullmatch(r"id\d+", path.name)):
        faces, voices = _files(folder / "faces", PICTURES), _files(folder / "voices", SOUNDS)
        if faces and voices:
            persons.append(Person(folder.name, tuple(faces), tuple(voices)))
        else:
            lacking.append(f"{folder.name} (no {'voices' if faces else 'faces'})")
    return People(tuple(persons), (f"left out: {some(lacking)}",) if lacking else ())


def _from_folders(faces: Path, voices: Path, pattern: str | None) -> People:
    """By the path below each folder without its ending."""
    for folder in (faces, voices):
        _listed(folder)
    seen = {str(path.relative_to(faces).with_suffix("")): path for path in _files(faces, PICTURES)}
    heard = {str(path.relative_to(voices).with_suffix("")): path for path in _files(voices, SOUNDS)}
    rows = []
    for key in sorted(seen.keys() & heard.keys()):
        rows.append(_Row(seen[key], heard[key],
                         _by_pattern(pattern, key) or _by_voxceleb(key) or key.partition("/")[0]))
    alone = [(f"{len(names)} {what} without a {other}: {some(sorted(names))}") for names, what, other in
             ((seen.keys() - heard.keys(), "faces", "voice"), (heard.keys() - seen.keys(), "voices", "face")) if names]
    return People(_grouped(rows), tuple(alone))


def _from_list(path: Path) -> list[_Row]:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.rstrip("\r").split("\t")
        if len(parts) not in (2, 3) or not all(part.strip() for part in parts):
            raise JobError(f"{path}:{number}: expected <face>TAB<voice>, or <face>TAB<voice>TAB<identity>: {line!r}",
                           "separate with one tab, not with spaces")
        face, voice, *identity = (part.strip() for part in parts)
        rows.append(_Row(path.parent / face, path.parent / voice, identity[0] if identity else None))
    return rows


def _from_json(path: Path) -> list[_Row]:
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise JobError(f"{path}: is no JSON: {error}") from None
    rows = []
    for number, row in enumerate(found if isinstance(found, list) else [found]):
        given = {key: row.get(key) for key in ("face", "voice", "identity", "gender")} if isinstance(row, dict) else {}
        wrong = [key for key, value in given.items() if not isinstance(value, str) and (value is not None
                                                                                       or key in ("face", "voice"))]
        if not given or wrong:
            raise JobError(f"{path}: entry {number}: {' and '.join(wrong) or 'it'} must be text: {row!r}",
                           'as in {"face": "a.jpg", "voice": "a.wav", "identity": "id00001"}')
        rows.append(_Row(path.parent / given["face"], path.parent / given["voice"], given["identity"], given["gender"]))
    return rows


def _identified(rows: list[_Row], pattern: str | None, base: Path) -> list[_Row]:
    """Every row with an identity."""
    named = []
    for row in rows:
        face, voice = (str(path.relative_to(base)) for path in (row.face, row.voice))
        found = {_by_pattern(pattern, path) or _by_voxceleb(path) for path in (face, voice)} - {None}
        if row.identity is None and len(found) > 1:
            both = " and ".join(sorted(map(str, found)))
            raise JobError(f"{face} and {voice} are one pair, but their names say {both}",
                           "correct the list, or give the identity itself")
        named.append(replace(row, identity=row.identity or next(iter(found), None)))
    return _joined(named)


def _joined(rows: list[_Row]) -> list[_Row]:
    """Rows without an identity take the one of a row that they share a file with, or get one of their own."""
    above: dict[Path, Path] = {}

    def root(path: Path) -> Path:
        while above.setdefault(path, path) != path:
            path = above[path]
        return path

    for row in rows:
        above[root(row.voice)] = root(row.face)
    known = {root(row.face): row.identity for row in rows if row.identity is not None}
    return [row if row.identity is not None
            else replace(row, identity=known.get(root(row.face), root(row.face).with_suffix("").name)) for row in rows]


def _by_pattern(pattern: str | None, path: str) -> str | None:
    if pattern is None:
        return None
    match = re.search(pattern, path)
    if match is None:
        raise JobError(f"data.identity: the pattern {pattern!r} is not found in {path}", "it must match every file")
    return match[1]


def _by_voxceleb(path: str) -> str | None:
    match = _VOXCELEB.search(path)
    return match[1] if match else None


def _grouped(rows: Iterable[_Row]) -> tuple[Person, ...]:
    faces: dict[str, dict[Path, None]] = {}
    voices: dict[str, dict[Path, None]] = {}
    genders: dict[str, str] = {}
    for row in rows:
        name = str(row.identity)
        faces.setdefault(name, {})[row.face] = None
        voices.setdefault(name, {})[row.voice] = None
        if row.gender:
            genders[name] = row.gender
    return tuple(Person(name, tuple(faces[name]), tuple(voices[name]), genders.get(name)) for name in sorted(faces))


def _check_one_owner(people: People) -> None:
    owners: dict[Path, str] = {}
    for person in people.persons:
        for path in (*person.faces, *person.voices):
            if owners.setdefault(path, person.name) != person.name:
                raise JobError(f"{path} belongs to two identities: {owners[path]} and {person.name}",
                               "correct the list: a face or a voice is one person's")


def _with_genders(people: People, path: Path) -> People:
    rows = list(csv.reader(_text(path).splitlines(), delimiter="\t"))
    header = [word.strip().lower() for word in rows[0]] if rows else []
    column = header.index("gender") if "gender" in header else 1
    known = {row[0].strip(): row[column].strip().lower() for row in rows if len(row) > column}
    persons = tuple(replace(person, gender=person.gender or known.get(person.name)) for person in people.persons)
    unknown = sum(person.gender is None for person in persons)
    notes = (f"{path}: says nothing of {unknown} of {len(persons)} identities",) if unknown else ()
    return People(persons, (*people.notes, *notes))


def _spread(media: tuple[Path, ...], most: int) -> tuple[Path, ...]:
    count = min(most, len(media))
    return tuple(media[index * len(media) // count] for index in range(count))


def _files(folder: Path, endings: frozenset[str]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)


def _listed(folder: Path) -> list[Path]:
    return _reading(folder, lambda: list(folder.iterdir()))


def _text(path: Path) -> str:
    return _reading(path, lambda: path.read_text(encoding="utf-8-sig"))


def _reading(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}", "is the path right, as this machine sees it?") from None
    except UnicodeDecodeError:
        raise JobError(f"{path}: is no text in UTF-8", "a pair list or JSON file is expected") from None
