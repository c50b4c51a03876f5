"""Reading logs over a link that breaks, and the lines of several ranks."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import Unreachable
from launcher.logs import LogReader, Piece, Which, merged, settled


class Node:
    """A backend whose links carry what they are given, then break or end."""

    def __init__(self, *links: list[Any]) -> None:
        self.links = list(links)
        self.asked: list[dict[str, Any]] = []

    def logs(self, run_dir: str, **request: Any) -> Iterator[tuple[dict[str, Any], bytes]]:
        self.asked.append(request)
        for frame in self.links.pop(0):
            if isinstance(frame, Exception):
                raise frame
            yield frame


def text(offset: int, data: bytes, file: str = "000/rank-0") -> tuple[dict[str, Any], bytes]:
    return {"f": file, "o": offset, "n": len(data), "next": offset + len(data)}, data


END = ({"end": {"state": "COMPLETED"}}, b"")
ALIVE = ({"keepalive": 1.0}, b"")
CUT = Unreachable("connection reset")


def reader(node: Node, told: list[str], **which: Any) -> LogReader:
    return LogReader(node, "/w/runs/x", Which(**which), told.append, wait=lambda seconds: None)


def test_a_cut_is_taken_up_at_the_byte_where_it_happened() -> None:
    node, told = Node([text(0, b"one\ntw"), CUT], [CUT], [text(6, b"o\n"), END]), []
    log = reader(node, told, follow=True, lines=10)
    assert b"".join(piece.data for piece in log) == b"one\ntwo\n"
    assert log.final == {"state": "COMPLETED"}
    assert [request["offsets"] for request in node.asked] == [{}, {"000/rank-0": 6}, {"000/rank-0": 6}]
    assert [request["lines"] for request in node.asked] == [10, None, None]
    assert len(told) == 1 and "connection reset" in told[0]


def test_each_new_loss_is_said_once() -> None:
    node, told = Node([text(0, b"a"), CUT], [text(1, b"b"), CUT], [ALIVE, END]), []
    assert b"".join(piece.data for piece in reader(node, told, follow=True)) == b"ab"
    assert len(told) == 2


def test_a_stream_that_stops_without_an_end_is_a_lost_link() -> None:
    node, told = Node([text(0, b"a")], [text(1, b"b"), END]), []
    assert b"".join(piece.data for piece in reader(node, told, follow=True)) == b"ab"


def test_without_follow_or_before_the_first_word_a_dead_node_is_an_error() -> None:
    with pytest.raises(Unreachable):
        list(reader(Node([CUT]), [], follow=True))
    with pytest.raises(Unreachable):
        list(reader(Node([text(0, b"a"), CUT]), []))


def test_lines_of_several_ranks_are_never_mixed() -> None:
    written = [(0, b"first li"), (1, b"other\n"), (0, b"ne\nopen"), (1, b"x\r\n")]
    pieces = [Piece(0, rank, data) for rank, data in written]
    out = b"".join(merged(pieces))
    assert out == b"[rank 1] other\n[rank 0] first line\n[rank 1] x\r\n[rank 0] open\n"


def test_a_progress_bar_of_several_ranks_moves() -> None:
    pieces = [Piece(0, 0, b" 10%\r 20%\r"), Piece(0, 0, b" 30%\r")]
    assert b"".join(merged(pieces)) == b"[rank 0]  10%\r[rank 0]  20%\r[rank 0]  30%\r"


def test_a_line_without_end_does_not_fill_the_memory() -> None:
    out = merged(Piece(0, 0, b"x" * 50_000) for _ in range(4))
    assert max(len(block) for block in out) < 200_000


def test_of_a_progress_bar_that_is_over_its_last_state_is_shown() -> None:
    parts = [b"begin\n\r 10%", b"|#  \r 20%|", b"##\r", b" 99%\r100%|###\nEpoch 2\r\n\r", b"  5%\r        \rdone\n 6%\r     \nend\r 7%"]
    shown = b"".join(piece.data for piece in settled(Piece(0, 0, part) for part in parts))
    assert shown == b"begin\n100%|###\nEpoch 2\ndone\n 6%\n 7%"
    both = [Piece(0, rank, part) for part in (b"\r1%", b"\r2%\n") for rank in (0, 1)]
    assert b"".join(merged(settled(both))) == b"[rank 0] 2%\n[rank 1] 2%\n"


def test_what_holds_no_bar_passes_as_it_is() -> None:
    parts = [b"a\nb", b"\x00\xff\n", b"c" * 200_000, b"d\n", b"e"]
    pieces = list(settled(Piece(0, 0, part) for part in parts))
    assert b"".join(piece.data for piece in pieces) == b"".join(parts)
    assert b"\r" not in parts and max(len(piece.data) for piece in pieces) < 300_000
