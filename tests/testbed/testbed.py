"""The test bed as tests use it: every change to a node is a context manager that puts things back."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .bed import Bed

CONDA_SH = """\
conda() {
    if [ "$1" != activate ]; then echo "conda: only activate is known here" >&2; return 2; fi
    if [ ! -d "$_CONDA_BASE/envs/$2" ]; then
        printf '\\nEnvironmentNameNotFound: Could not find conda environment: %s\\n' "$2" >&2; return 1
    fi
    export CONDA_PREFIX="$_CONDA_BASE/envs/$2" CONDA_DEFAULT_ENV="$2" CONDA_SHLVL=1
    export PATH="$CONDA_PREFIX/bin:$PATH"
    for _script in "$CONDA_PREFIX"/etc/conda/activate.d/*.sh; do . "$_script"; done
}
"""
TALKING_BASHRC = """\
echo "Welcome to $(hostname)! You have 3 new messages."
echo "quota: disk almost full" >&2
printf '%s@%s:~$ ' "$USER" "$(hostname)"
"""


class Testbed(Bed):
    __test__ = False

    # -------------------------------------------------------------------------------------- faults
    @contextmanager
    def link_down(self, node: str) -> Iterator[None]:
        """The cable of the node is pulled."""
        with self._undone(node, ("link", "down"), ("link", "up")):
            yield

    @contextmanager
    def frozen(self, node: str) -> Iterator[None]:
        """The node hangs: its kernel acknowledges, no process answers."""
        with self._undone(node, ("freeze",), ("thaw",)):
            yield

    @contextmanager
    def power_cut(self, node: str) -> Iterator[None]:
        """The node loses power without a last word; afterwards it boots again, with another boot id."""
        with self._undone(node, ("poweroff",), ("poweron",)):
            yield

    @contextmanager
    def sshd_killed(self, node: str) -> Iterator[None]:
        """New connections are refused; open ones go on."""
        with self._undone(node, ("kill9", "sshd"), ("start", "sshd")):
            yield

    @contextmanager
    def packet_loss(self, node: str, percent: float) -> Iterator[None]:
        """Frames are lost, in each direction."""
        with self._undone(node, ("loss", str(percent)), ("heal",)):
            yield

    @contextmanager
    def partitioned(self, node: str, *others: str) -> Iterator[None]:
        """Nothing that the node sends to the others arrives."""
        with self._undone(node, ("partition", *others), ("heal",)):
            yield

    @contextmanager
    def slow_link(self, node: str, delay_ms: float, loss_percent: float = 0.0) -> Iterator[None]:
        """Every frame is held `delay_ms`, in each direction."""
        how = ("netem", "--delay", str(delay_ms), "--loss", str(loss_percent))
        with self._undone(node, how, ("netem-off",)):
            yield

    @contextmanager
    def memory_limit(self, node: str, limit: str) -> Iterator[None]:
        """All processes of the node together have at most `limit` (such as 400M)."""
        with self._undone(node, ("memlimit", limit), ("memlimit", "max")):
            yield

    @contextmanager
    def full_disk(self, node: str, directory: str, size: str = "64k") -> Iterator[str]:
        """A file system without a free byte is mounted at the directory."""
        with self._undone(node, ("diskfull", directory, size), ("unmount", directory)):
            yield directory

    @contextmanager
    def read_only(self, node: str, directory: str) -> Iterator[str]:
        """A read-only file system is mounted at the directory."""
        with self._undone(node, ("readonly", directory), ("unmount", directory)):
            yield directory

    @contextmanager
    def _undone(self, node: str, fault: tuple[str, ...], undo: tuple[str, ...]) -> Iterator[None]:
        try:
            self.fault(node, *fault)
            yield
        finally:
            self.fault(node, *undo)

    # -------------------------------------------------------------------------------------- changes to a node
    @contextmanager
    def login_shell(self, node: str, user: str, shell: str = "/bin/tcsh") -> Iterator[None]:
        """The user's login shell; tcsh stands for those that are not POSIX."""
        passwd = self.read(node, "/etc/passwd")
        lines = [line.rsplit(":", 1) for line in passwd.splitlines()]
        changed = [f"{rest}:{shell if rest.startswith(f'{user}:') else old}" for rest, old in lines]
        with self.file(node, "/etc/passwd", "\n".join(changed) + "\n"):
            yield

    @contextmanager
    def file(
        self, node: str, path: str, text: str, user: str | None = None, mode: str = "644"
    ) -> Iterator[None]:
        """A file with this text, in the place of what was there."""
        saved = f"{path}.saved-by-the-test"
        self.sh(node, '[ ! -e "$1" ] || cp -p "$1" "$2"', path, saved, user=user)
        self.write(node, path, text, user, mode)
        try:
            yield
        finally:
            self.sh(node, 'if [ -e "$2" ]; then mv "$2" "$1"; else rm -f "$1"; fi', path, saved, user=user)

    @contextmanager
    def talking_bashrc(self, node: str, user: str) -> Iterator[None]:
        """A .bashrc that prints to both streams, and something that looks like a prompt."""
        with self.file(node, f"/home/{user}/.bashrc", TALKING_BASHRC, user):
            yield

    @contextmanager
    def sshd_options(self, node: str, *lines: str) -> Iterator[None]:
        """sshd runs with these options first, such as `MaxStartups 2` or `DenyUsers alice`."""
        try:
            with self.file(node, "/etc/ssh/sshd_config.d/test.conf", "\n".join(lines) + "\n"):
                self._restart_sshd(node)
                yield
        finally:
            self._restart_sshd(node)

    def _restart_sshd(self, node: str) -> None:
        self.fault(node, "kill9", "sshd")
        self.fault(node, "start", "sshd")

    @contextmanager
    def new_host_key(self, node: str) -> Iterator[None]:
        """The node was installed anew: its host key is none that anybody knows."""
        key = "/etc/ssh/test_host_key"
        self.exec(node, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        try:
            with self.sshd_options(node, f"HostKey {key}", "HostKeyAlgorithms ssh-ed25519"):
                yield
        finally:
            self.exec(node, "rm", key, f"{key}.pub")

    @contextmanager
    def without_python(self, node: str) -> Iterator[None]:
        """No Python can be found on the node, the tests' own included."""
        directories = ("/usr/bin", "/usr/local/bin", str(Path(sys.executable).resolve().parent))
        # A character device 0:0 is overlayfs' mark of a deleted file.
        hide = """hidden=$(mktemp -d); chmod 755 "$hidden"; cd "$1"
            for f in python*; do mknod "$hidden/$f" c 0 0; done
            mount -t overlay -o "lowerdir=$hidden:$1" without-python "$1" """
        hidden = []
        try:
            for directory in sorted(set(directories)):
                self.sh(node, hide, directory)
                hidden.append(directory)
            yield
        finally:
            for directory in hidden:
                self.exec(node, "umount", "-l", directory)

    @contextmanager
    def conda(self, node: str, user: str, name: str, base: str | None = None) -> Iterator[str]:
        """A conda-shaped installation with one environment, whose Python is the one of the tests.

        `conda activate` also sets TEST_CONDA_ACTIVATED, by a script in activate.d. Yields the base directory.
        """
        base = base or f"/home/{user}/miniconda3"
        env = f"{base}/envs/{name}"
        try:
            self.write(node, f"{base}/etc/profile.d/conda.sh", f"_CONDA_BASE='{base}'\n{CONDA_SH}", user)
            self.write(node, f"{env}/etc/conda/activate.d/test.sh", "export TEST_CONDA_ACTIVATED=1\n", user)
            self._link_python(node, user, env)
            yield base
        finally:
            self.exec(node, "rm", "-rf", base, user=user)

    def _link_python(self, node: str, user: str, env: str) -> None:
        self.sh(node, 'mkdir -p "$1/bin"; ln -s "$2" "$1/bin/python"', env, sys.executable, user=user)
        if sys.prefix != sys.base_prefix:  # a link to a virtual environment's Python is not that environment
            cfg = Path(sys.prefix, "pyvenv.cfg").read_text()
            self.write(node, f"{env}/pyvenv.cfg", cfg, user)
            self.exec(node, "ln", "-s", f"{sys.prefix}/lib", f"{env}/lib", user=user)
