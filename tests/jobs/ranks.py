"""Starts ranks by fork, torch imported once: a request per line on stdin {"ranks", "env"}, exit codes on
stdout. They run the small stage, or with "module" and "argv" the job of that module.

Much faster than a torchrun per scenario, and one process per rank all the same. Run as a module.
"""
from __future__ import annotations

import importlib
import json
import os
import socket
import sys

import torch

from jobs.runtime import run_job


def fork_rank(rank: int, ranks: int, port: int, env: dict[str, str], module: str, argv: list[str]) -> int:
    main = importlib.import_module(module).main
    if pid := os.fork():
        return pid
    sys.argv = [module, *argv]
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    os.dup2(os.open(env["OUTPUT"] + f".{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    code = 1
    try:
        run_job(main, rank)
    except SystemExit as ended:  # alone
        code = int(ended.code or 0)
    except BaseException as error:  # the child must never return into the loop of its parent
        print(repr(error), flush=True)
    sys.stdout.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        port = free_port()
        module, argv = asked.get("module", "tests.jobs.small_stage"), asked.get("argv", [])
        pids = [fork_rank(rank, asked["ranks"], port, asked["env"], module, argv) for rank in range(asked["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)
    os._exit(0)  # all that was asked is done; taking many modules apart takes seconds on a busy machine
