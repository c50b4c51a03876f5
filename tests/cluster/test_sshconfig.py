"""What OpenSSH says about a host, without any host."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster import hostkeys
from cluster.errors import Unreachable, Unusable
from cluster.sshconfig import Target, parse, resolve, split_jump


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return parse("hostname 10.0.0.5\nport 2222\nuser alice\nuserknownhostsfile none\n", "box", None, 5.0)


def test_the_persons_configuration_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("private")
    (tmp_path / "held by the agent.pub").write_text("ssh-ed25519 AAAA")
    (tmp_path / "more").write_text(
        "Host box\n  HostName box.lab\n  Port 2022\n  ConnectTimeout 9\n"
        "  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  IdentityFile {tmp_path}/key\n  IdentityFile {tmp_path}/absent\n"
        f"  IdentityFile \"{tmp_path}/held by the agent\"\n"
        f"  UserKnownHostsFile {tmp_path}/one {tmp_path}/two\n  ProxyCommand relay --to %h:%p '%r 100%%'\n")
    (tmp_path / "config").write_text(f"Include {tmp_path}/more\nHost *\n  User alice\n  HostName wrong\n")
    found = resolve("box", str(tmp_path / "config"), 5.0)
    assert (found.hostname, found.port, found.user, found.timeout_s) == ("box.lab", 2022, "alice", 9.0)
    assert found.identities == (tmp_path / "key", tmp_path / "held by the agent")
    assert found.identities_only and found.agent is None
    assert found.known_hosts[:2] == (tmp_path / "one", tmp_path / "two")
    assert found.proxy_command == "relay --to box.lab:2022 'alice 100%'"
    assert (found.jumps, found.key_name) == ((), "[box.lab]:2022")
    assert found.command == f"ssh -F {tmp_path}/config box"


def test_jump_hosts_agent_and_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    (tmp_path / "config").write_text("Host box\n  ProxyJump bob@a:24,b\n  HostKeyAlias the-box\n")
    found = resolve("box", str(tmp_path / "config"), 5.0)
    assert found.jumps == ("bob@a:24", "b")
    assert (found.agent, found.key_name, found.timeout_s) == ("/run/agent", "the-box", 5.0)
    assert resolve("c", str(tmp_path / "config"), 5.0, "carl", 26).user == "carl"


@pytest.mark.parametrize(("jump", "parts"), [
    ("a", ("a", None, None)), ("bob@a:24", ("a", "bob", 24)), ("ssh://a:24", ("a", None, 24)),
    ("[fe80::1]:24", ("fe80::1", None, 24)), ("bob@fe80::1", ("fe80::1", "bob", None))])
def test_jump_words(jump: str, parts: tuple[str, str | None, int | None]) -> None:
    assert split_jump(jump) == parts


def test_a_configuration_that_ssh_refuses(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("Prot 22\n")
    with pytest.raises(Unusable, match="(?i)bad configuration"):
        resolve("box", str(tmp_path / "config"), 5.0)
    with pytest.raises(Unusable, match="ssh does not accept"):
        resolve("box", str(tmp_path / "none"), 5.0)


def test_known_hosts_lines_and_their_judgement(target: Target, tmp_path: Path) -> None:
    file = tmp_path / "known"
    known = hostkeys.parse(
        "# Host box found: line 3 \n@revoked box ssh-ed25519 BAD\n# Host box found: line 7 CA\n"
        "@cert-authority *.lab ssh-rsa CA comment\n# Host box found: line 9 \nbox ssh-ed25519 GOOD\n", file)
    assert [(key.line, key.marker, key.base64) for key in known] == [
        (3, "@revoked", "BAD"), (7, "@cert-authority", "CA"), (9, "", "GOOD")]
    hostkeys.check(target, "ssh-ed25519", "GOOD", "SHA256:x", known)
    for key, words in (("BAD", "revoked in .*known:3"), ("NEW", "HAS CHANGED.*known:9")):
        with pytest.raises(Unreachable, match=words):
            hostkeys.check(target, "ssh-ed25519", key, "SHA256:x", known)
    with pytest.raises(Unreachable, match="certificate authority"):
        hostkeys.check(target, "ssh-ed25519", "GOOD", "SHA256:x", known[1:2])
    with pytest.raises(Unreachable, match="not known yet") as caught:
        hostkeys.check(replace(target, known_hosts=(file,)), "ssh-ed25519", "GOOD", "SHA256:x", [])
    assert f"ssh-keyscan -p 2222 10.0.0.5 >> {file}" in str(caught.value)
