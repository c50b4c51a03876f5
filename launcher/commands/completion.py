"""launch completion: what makes the Tab key of a shell know jobs, nodes and stages."""
from __future__ import annotations

import sys
from collections.abc import Sequence

from launcher import completion
from launcher.commands._common import here, parser

_ASK = "--words"  # what the scripts call: --words SHELL WORD…
_FILES = 3  # exit code: a file stands here
_HOW = """
bash: echo 'source <(launch completion bash)' >> ~/.bashrc
zsh: echo 'source <(launch completion zsh)' >> ~/.zshrc, after compinit.
fish: launch completion fish > ~/.config/fish/completions/launch.fish
"""


def run(argv: Sequence[str]) -> int:
    if argv[:1] == [_ASK]:
        return _answer(argv[1], argv[2:])
    print(completion.SCRIPTS[_parser().parse_args(argv).shell].strip())
    return 0


def _answer(shell: str, words: Sequence[str]) -> int:
    """One candidate on a line; what cannot stand on one is not offered."""
    words, kept = completion.typed(words or [""], split=shell == "bash")
    found = completion.candidates(words, here())
    if found is completion.FILES:
        return _FILES
    sys.stdout.write("".join(f"{word.removeprefix(kept)}\n" for word in found if word.isprintable()))
    return 0


def _parser():
    p = parser("completion", "Print a script that completes verbs, options, jobs, nodes, stages and run files.")
    p.epilog = _HOW
    p.add_argument("shell", choices=sorted(completion.SCRIPTS), metavar="SHELL", help="bash, zsh or fish")
    return p
