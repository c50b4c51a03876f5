"""What a frozen tower makes of files, kept by content: a file and a tower that have met do not meet again.

    DIRECTORY/media.jsonl                     path, size, mtime and SHA-256 of files, so that they are read once for it
    DIRECTORY/<tower>/<rows>.safetensors      contents [n, 32] SHA-256 of files, features [n, width]

`<tower>` names weights, normalisation and clip, `<rows>` the contents. A shard appears whole or not at all; whoever was
killed goes on with what its shards lack.
"""
from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cluster.contract import read_json_lines, sha256_file
from jobs.metrics import append_line
from jobs.runtime import JobError, WriteFailed
from jobs.tensorfile import write_tensors
from jobs.world import World

SHARD = 512  # rows; what a kill can cost
_MEMO = "media.jsonl"


@dataclass(frozen=True)
class Kept:
    """The features of files, in place of the files: a jobs.data.seen_heard.Medium."""

    features: dict[Path, Tensor]

    def read(self, path: Path, draw: int | None = None) -> Tensor:  # noqa: ARG002
        return self.features[path]

    def together(self, items: list[Tensor]) -> tuple[Tensor, None]:
        return torch.stack(items), None


def kept_features(paths: list[Path], encode: Callable[[list[Path]], Tensor], tower: str, directory: Path, batch: int,
                  world: World, stop_asked: Callable[[], bool], say: Callable[[str], None]) -> Kept | None:
    """The features of all `paths`; what is missing is encoded, divided over the ranks. None when asked to stop.

    `tower`: everything besides the file that the features depend on. Raises AgreedError.
    """
    home = directory / hashlib.sha256(tower.encode()).hexdigest()[:16]
    world.on_main(lambda: _make(home))
    contents = world.on_main(lambda: _contents(sorted(set(paths)), directory))
    known = _read_shards(home)
    path_of = {content: path for path, content in contents.items() if content not in known}
    missing = sorted(path_of)
    say(f"features of {len(contents)} files: {len(contents) - len(missing)} are there, {len(missing)} to make")
    mine = missing[world.rank::world.size]
    world.all_or_none(lambda: _encode(mine, path_of, encode, home, batch, stop_asked))
    if world.any(stop_asked()):
        return None
    known |= _read_shards(home)
    return Kept({path: known[content] for path, content in contents.items()})


def _encode(missing: list[str], path_of: dict[str, Path], encode: Callable[[list[Path]], Tensor], home: Path,
            batch: int, stop_asked: Callable[[], bool]) -> None:
    rows: dict[str, Tensor] = {}
    for start in range(0, len(missing), batch):
        if stop_asked():
            break
        part = missing[start:start + batch]
        features = encode([path_of[content] for content in part]).float().cpu()
        if bad := [str(path_of[content]) for content, row in zip(part, features) if not row.isfinite().all()]:
            raise JobError(f"the frozen tower's features of {', '.join(bad)} are not finite",
                           "look at these files and at the tower's weights")
        rows.update(zip(part, features))
        if len(rows) >= SHARD:
            _write_shard(home, rows)
            rows = {}
    if rows:
        _write_shard(home, rows)


def _write_shard(home: Path, rows: dict[str, Tensor]) -> None:
    contents = torch.tensor([list(bytes.fromhex(content)) for content in rows], dtype=torch.uint8)
    name = hashlib.sha256("".join(rows).encode()).hexdigest()[:16]
    aside = home / f".tmp-{name}-{os.getpid()}"
    with _written(home), contextlib.suppress(FileExistsError):
        write_tensors(aside, {"contents": contents, "features": torch.stack(list(rows.values())).contiguous()})
        os.rename(aside, home / f"{name}.safetensors")


def _read_shards(home: Path) -> dict[str, Tensor]:
    """A shard that cannot be read is as good as none."""
    found: dict[str, Tensor] = {}
    for path in sorted(home.glob("*.safetensors")):
        try:
            shard = load_file(path)
        except (SafetensorError, OSError):
            continue
        found |= {bytes(content).hex(): row for content, row in zip(shard["contents"].tolist(), shard["features"])}
    return found


def _contents(paths: list[Path], directory: Path) -> dict[Path, str]:
    """The SHA-256 of each file, from the memo where size and time are still the same. Raises JobError, WriteFailed."""
    memo = directory / _MEMO
    known = {}
    if memo.exists():
        known = {(line["path"], line["size"], line["mtime_ns"]): line["sha256"] for line in read_json_lines(memo)}
    found = {}
    for path in paths:
        try:
            stat = path.stat()
            key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns)
            found[path] = known.get(key) or sha256_file(path)
        except OSError as error:
            raise JobError(f"{path}: {error.strerror}") from None
        if key not in known:
            append_line(memo, dict(zip(("path", "size", "mtime_ns"), key)) | {"sha256": found[path]})
    return found


def _make(home: Path) -> None:
    with _written(home):
        home.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _written(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteFailed(f"cannot write features to {home}: {error.strerror}",
                          "free some disk space, or set features.directory") from None
