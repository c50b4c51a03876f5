"""What the person's known_hosts files say about a host. ssh-keygen reads them: hashed names, patterns and
markers count.
"""
from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import Unreachable
from cluster.sshconfig import Target


@dataclass(frozen=True)
class KnownKey:
    file: Path
    line: int
    marker: str  # "", "@revoked" or "@cert-authority"
    kind: str  # ssh-ed25519, …
    base64: str


def known_keys(target: Target) -> list[KnownKey]:
    """Every line about the host, in the order ssh reads them."""
    name = target.key_name.lower()
    return [key for file in target.known_hosts if file.is_file() for key in _in_file(name, file)]


def _in_file(name: str, file: Path) -> list[KnownKey]:
    done = subprocess.run(["ssh-keygen", "-F", name, "-f", str(file)], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)
    return parse(done.stdout, file)


def parse(text: str, file: Path) -> list[KnownKey]:
    """The output of `ssh-keygen -F`: `# Host NAME found: line N`, then that line; the comment ends with the
    marker.
    """
    found = []
    number = 0
    for line in text.splitlines():
        if line.startswith("# Host "):
            number = int(line.rpartition("found: line ")[2].split()[0])
            continue
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) >= 3:
            found.append(KnownKey(file, number, marker, words[1], words[2]))
    return found


def check(target: Target, kind: str, base64: str, fingerprint: str, known: list[KnownKey]) -> None:
    """Raises Unreachable unless the key that the host shows is one that the person has accepted."""
    same = [key for key in known if (key.kind, key.base64) == (kind, base64)]
    if any(key.marker == "@revoked" for key in same):
        where = f"{same[0].file}:{same[0].line}"
        raise Unreachable(f"its host key ({kind} {fingerprint}) is marked as revoked in {where}", target.name,
                      "do not use this machine before its administrator has explained that")
    if any(not key.marker for key in same):
        return
    if other := next((key for key in known if not key.marker), None):
        raise Unreachable(
            f"ITS HOST KEY HAS CHANGED: it shows {kind} {fingerprint}, but {other.file}:{other.line} has "
            "another one. Somebody may be listening in, or the machine was installed anew", target.name,
            f"ask its administrator; if the new key is right: "
            f"ssh-keygen -R '{target.key_name}' -f '{other.file}', then: {target.command}")
    if known:
        raise Unreachable(f"its host key ({kind} {fingerprint}) is known through a certificate authority only "
                      f"({known[0].file}:{known[0].line}), which launch cannot check", target.name,
                      f"add the key itself to known_hosts: {_scan(target)}")
    raise Unreachable(f"its host key is not known yet ({kind} {fingerprint})", target.name,
                  f"compare the fingerprint, then accept the key with: {target.command}\n"
                  f"  (or without a question: {_scan(target)})")


def _scan(target: Target) -> str:
    file = target.known_hosts[0] if target.known_hosts else Path("~/.ssh/known_hosts")
    port = f"-p {target.port} " if target.port != 22 else ""
    return f"ssh-keyscan {port}{target.hostname} >> {file}"
