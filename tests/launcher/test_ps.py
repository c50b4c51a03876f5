"""`launch ps`: one's own programs, one line each, and which of them are jobs."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers import wait_until

from .conftest import Person

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()', sys.argv[1]])"


def test_a_program_is_one_line_and_a_job_says_its_name(person: Person, tmp_path: Path) -> None:
    job = person.submit("--cwd", str(tmp_path), "--", sys.executable, "-c", "import time; time.sleep(99)", "of a job")
    person.until(job, lambda found: found["state"] == "RUNNING")
    with subprocess.Popen(["sh", "-c", '"$@"; :', "sh", sys.executable, "-c", PARENT, "by hand"],
                          stdin=subprocess.PIPE) as shell:
        def mine() -> dict[str, dict]:
            found = json.loads(person.run("ps", "--json").stdout)
            return {word: one for one in found for word in ("of a job", "by hand") if word in one["command"]}

        found = wait_until(lambda: len(found := mine()) == 2 and found, 20, "both programs")
        assert (found["by hand"]["pid"], found["by hand"]["job"]) == (shell.pid, None)
        assert found["of a job"]["job"] == job
        shell.stdin.close()
    person.run("kill", "--now", job)
