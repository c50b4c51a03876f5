"""The tests that failed beside others, once more and by themselves: python -m tests.alone EXIT_CODE_OF_PYTEST

Three workers on two cores are more than some limits of time were made for. What fails alone as well is a failure, and so
are more than a few; the first result stands above in either case.
"""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

MOST = 3
FAILED = Path(".pytest_cache/v/cache/lastfailed")


def main(code: int) -> int:
    if code != 1:  # interrupted, or not run at all
        return code
    failed = list(json.loads(FAILED.read_text()))
    if len(failed) > MOST:
        return code
    print(f"\n{len(failed)} failed beside others (above); once more, alone:", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", *failed]).returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
