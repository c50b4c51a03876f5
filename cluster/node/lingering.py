"""What outlives a logout: logind may end everything that a login has started (KillUserProcesses), a supervisor too.

Then it is started below the user's own systemd instead, which stays as long as the user lingers.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_ASK_S = 5.0
_LOGIND = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
_LOGIND_CONF = ("/usr/lib/systemd", "/usr/local/lib/systemd", "/run/systemd", "/etc/systemd")  # the later ones win
_RUNTIME = Path("/run/user")  # a directory for each user who is logged in, by logind
_LINGERING = Path("/var/lib/systemd/linger")


def run(command: Sequence[str], env: Mapping[str, str], **how: Any) -> subprocess.CompletedProcess[bytes]:
    """subprocess.run, so that what goes on behind the command outlives the login as far as that can be."""
    runtime = _RUNTIME / str(os.getuid())
    if shutil.which("systemd-run") and runtime.is_dir() and kills_at_logout():
        scope = ["systemd-run", "--user", "--scope", "--quiet", "--collect", "--", *command]
        done = subprocess.run(scope, env={**env, "XDG_RUNTIME_DIR": str(runtime)}, **how)
        if done.returncode == 0:
            return done
    return subprocess.run(command, env=env, **how)


def kills_at_logout() -> bool | None:
    """Whether logind ends what a login has started when that logs out (KillUserProcesses); None: nobody says.

    The running logind knows; where its bus is out of reach, its files do.
    """
    asked = said(["busctl", "get-property", *_LOGIND, "KillUserProcesses"])
    if asked.startswith("b "):
        return asked == "b true"
    for line in (*_conf_lines(), said(["loginctl", "show-session", "--property=KillUserProcesses"])):
        if found := re.fullmatch(r"\s*KillUserProcesses\s*=\s*(\w+)\s*", line):
            return found[1].lower() in ("yes", "true", "on", "1")
    return None


def lingers(user: str) -> bool:
    """Whether this user's processes may stay after the last logout."""
    return (_LINGERING / user).exists()


def said(command: Sequence[str]) -> str:
    """The first line of what a program prints; empty: it is not there, failed or hangs."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def _conf_lines() -> Iterator[str]:
    """Of logind.conf and its drop-ins, those that count most first."""
    drop_ins = {path.name: path for place in _LOGIND_CONF for path in Path(place, "logind.conf.d").glob("*.conf")}
    mains = [path for place in reversed(_LOGIND_CONF) if (path := Path(place, "logind.conf")).is_file()][:1]
    for path in [*(drop_ins[name] for name in sorted(drop_ins, reverse=True)), *mains]:
        try:
            yield from reversed(path.read_text(errors="replace").splitlines())
        except OSError:
            continue
