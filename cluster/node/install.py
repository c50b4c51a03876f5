"""Puts the carried zip on a node, unpacked: `<workdir>/.launch/agent/<digest>/`, which `python -I <that>`
then runs.

This file runs as `python -c <its text>` on a node that has nothing of launch yet, so it imports the standard
library alone and nothing of ours. Unpacked, because Python keeps compiled files beside sources but never
inside a zip.
"""
from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile


def install(directory: str, agent: bytes) -> None:
    """Make `directory` hold the unpacked agent. It appears by one rename: where it is, it is whole.

    Raises OSError: the file system does not take it; nothing is left there then.
    """
    parent = os.path.dirname(directory)
    own = os.path.dirname(parent)  # <workdir>/.launch: code and secrets are in it, too
    os.makedirs(os.path.dirname(own), exist_ok=True)
    for private in (own, parent):
        if not os.path.isdir(private):
            os.makedirs(private, mode=0o700, exist_ok=True)
    aside = tempfile.mkdtemp(prefix=".new-", dir=parent)
    try:
        zipfile.ZipFile(io.BytesIO(agent)).extractall(aside)
        os.rename(aside, directory)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # else another client was faster: same content
            raise


def main() -> None:
    """stdin: one JSON line {mark, directory, size}, then the zip. stdout: mark, JSON answer, mark."""
    header = json.loads(sys.stdin.buffer.readline())
    answer: dict[str, object] = {}
    try:
        install(os.path.expanduser(header["directory"]), sys.stdin.buffer.read(header["size"]))
    except OSError as error:
        answer = {"os_error": [error.errno, error.strerror, error.filename]}
    print(header["mark"] + json.dumps(answer) + header["mark"], flush=True)


if __name__ == "__main__":
    main()
