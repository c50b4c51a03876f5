"""Why an attempt ended: recorded last words of real programs, and what a person is told."""
from __future__ import annotations

import pytest

from cluster.events import Reason
from cluster.node.failure import Facts, Retry, judge
from cluster.node.progress import Progress

TRAILER = """\
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
cluster.node FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-21_13:36:06
  host      : localhost
  rank      : {other} (local_rank: {other})
  exitcode  : {other_code} (pid: 27960)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 27960
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_13:36:05
  host      : localhost
  rank      : {root} (local_rank: {root})
  exitcode  : {root_code} (pid: 27961)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""
LOST_PEER = """\
[rank0]: Traceback (most recent call last):
[rank0]:   File "train.py", line 12, in <module>
[rank0]:     dist.all_reduce(x)
[rank0]: RuntimeError: [/__w/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:45243. This \
is typically caused by a remote worker crashing. Check the logs of the remote worker before reporting an error. GLHF!
"""
LOADER = """\
[rank1]: Traceback (most recent call last):
[rank1]:   File "train.py", line 11, in <module>
[rank1]:     for x in DataLoader(D(), num_workers=1):
[rank1]: FileNotFoundError: Caught FileNotFoundError in DataLoader worker process 0.
[rank1]: Original Traceback (most recent call last):
[rank1]:   File "worker.py", line 374, in _worker_loop
[rank1]:     data = fetcher.fetch(index)
[rank1]: FileNotFoundError: [Errno 2] No such file or directory: '/data/mouse/00005.png'

"""
CUDA_OOM = """\
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    y = model(x)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of \
which 1.13 GiB is free.
"""
KILLED_LOADER = """\
Traceback (most recent call last):
  File "train.py", line 11, in <module>
    for x in loader:
RuntimeError: DataLoader worker (pid 4242) is killed by signal: Killed.
"""
DISK = """\
Traceback (most recent call last):
  File "torch/serialization.py", line 967, in save
    _save(obj, opened_zipfile)
OSError: [Errno 28] No space left on device
"""
NCCL = """\
[rank0]:[E1121 10:11:12 ProcessGroupNCCL.cpp:633] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(\
SeqNum=5, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600042 milliseconds before timing out.
"""
PORT = """\
Traceback (most recent call last):
  File "train.py", line 2, in <module>
torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, \
code: -98, name: EADDRINUSE, message: address already in use
"""
TEARDOWN = """\
Traceback (most recent call last):
  File "train.py", line 9, in <module>
    raise KeyError("image_4")
KeyError: 'image_4'
Exception in thread Thread-1:
Traceback (most recent call last):
  File "queues.py", line 99, in _feed
ConnectionResetError: [Errno 104] Connection reset by peer
"""


def trailer(root: int, root_code: int, other_code: int = -15) -> str:
    return TRAILER.format(root=root, root_code=root_code, other=1 - root, other_code=other_code)


@pytest.mark.parametrize(("facts", "reason", "words", "retry"), [
    (Facts(1, logs={0: LOST_PEER, 1: LOADER}, agent=trailer(1, 1)),
     Reason.ERROR, "rank 1: FileNotFoundError: [Errno 2] No such file or directory: '/data/mouse/00005.png'",
     Retry.IF_PROGRESS),
    (Facts(1, logs={0: LOST_PEER, 1: LOADER}, agent=trailer(0, 1, 1)), Reason.ERROR, "rank 1: FileNotFoundError",
     Retry.IF_PROGRESS),
    (Facts(1, logs={0: LOST_PEER, 1: ""}, agent=trailer(1, -9)), Reason.SIGNAL, "rank 1: ended by SIGKILL",
     Retry.ALWAYS),
    (Facts(1, logs={0: LOST_PEER, 1: ""}, agent=trailer(0, 1, -9)), Reason.SIGNAL, "rank 1: ended by SIGKILL",
     Retry.ALWAYS),
    (Facts(1, logs={0: LOST_PEER, 1: ""}, agent=trailer(1, -9), oom_kills=1), Reason.HOST_OOM, "memory ran out",
     Retry.ALWAYS),
    (Facts(1, logs={0: LOST_PEER, 1: ""}, agent=trailer(1, -11)), Reason.ERROR, "rank 1: crashed with SIGSEGV",
     Retry.IF_PROGRESS),
    (Facts(1, logs={0: LOST_PEER, 1: LOST_PEER}, agent=trailer(0, 1)), Reason.COMMUNICATION,
     "Connection closed by peer", Retry.ALWAYS),
    (Facts(-9, logs={0: "", 1: ""}, agent=""), Reason.SIGNAL, "torchrun: ended by SIGKILL", Retry.ALWAYS),
    (Facts(1, logs={0: LOST_PEER + trailer(1, -9)}, agent=LOST_PEER + trailer(1, -9)), Reason.SIGNAL, "SIGKILL",
     Retry.ALWAYS),
    (Facts(1, logs={0: CUDA_OOM}), Reason.CUDA_OOM, "torch.OutOfMemoryError: CUDA out of memory", Retry.IF_PROGRESS),
    (Facts(1, logs={0: KILLED_LOADER}, oom_kills=1), Reason.HOST_OOM, "DataLoader worker", Retry.ALWAYS),
    (Facts(1, logs={0: KILLED_LOADER}), Reason.ERROR, "DataLoader worker", Retry.IF_PROGRESS),
    (Facts(1, logs={0: DISK}), Reason.DISK_FULL, "OSError: [Errno 28] No space left on device", Retry.NEVER),
    (Facts(1, logs={0: ""}, disk_full=True), Reason.DISK_FULL, "no space left for its log", Retry.NEVER),
    (Facts(1, logs={0: TEARDOWN}, disk_full=True), Reason.ERROR, "KeyError: 'image_4'", Retry.IF_PROGRESS),
    (Facts(1, logs={0: "cp: error writing 'x': No space left on device\n"}), Reason.DISK_FULL, "cp: error",
     Retry.NEVER),
    (Facts(-6, logs={0: NCCL, 1: ""}, agent=trailer(0, -6)), Reason.COMMUNICATION, "collective operation timeout",
     Retry.ALWAYS),
    (Facts(1, logs={0: PORT}), Reason.COMMUNICATION, "EADDRINUSE", Retry.ALWAYS),
    (Facts(1, logs={0: TEARDOWN}), Reason.ERROR, "KeyError: 'image_4'", Retry.IF_PROGRESS),
    (Facts(2, True, {0: "error: configs/x.yaml:3: optimizer.lr is 'fast'\n"}), Reason.ERROR, "optimizer.lr is 'fast'",
     Retry.NEVER),
    (Facts(1, True, {0: "error: sample m03: image_4.png is truncated\n" + TEARDOWN}), Reason.ERROR,
     "sample m03: image_4.png is truncated", Retry.NEVER),
    (Facts(1, logs={0: "error: cannot lock ref\n" + TEARDOWN}), Reason.ERROR, "KeyError: 'image_4'", Retry.IF_PROGRESS),
    (Facts(3, True, {0: "error: 50 updates in a row were not finite\n"}), Reason.NON_FINITE, "50 updates", Retry.NEVER),
    (Facts(3, logs={0: "bye\n"}), Reason.ERROR, "exit code 3: bye", Retry.IF_PROGRESS),
    (Facts(127, logs={0: "bash: line 1: trian: command not found\n"}), Reason.CANNOT_START, "trian", Retry.NEVER),
    (Facts(-15, logs={0: ""}), Reason.SIGNAL, "SIGTERM", Retry.ALWAYS),
    (Facts(1, logs={0: ""}), Reason.ERROR, "exit code 1", Retry.IF_PROGRESS),
    (Facts(0, logs={0: ""}), Reason.DONE, "", Retry.NEVER),
    (Facts(0, True, {0: ""}, progress=Progress(step=9, total=9)), Reason.DONE, "step 9", Retry.NEVER),
    (Facts(0, True, {0: ""}, progress=Progress(step=5, total=9)), Reason.BAD_EXIT, "step 5 of 9", Retry.NEVER),
    (Facts(0, True, {0: ""}, progress=Progress(step=4, total=9, done=True)), Reason.DONE, "step 4", Retry.NEVER),
    (Facts(1, True, {0: LOST_PEER}, progress=Progress(step=9, total=9, done=True)), Reason.DONE, "exit code 1",
     Retry.NEVER),
    (Facts(0, True, {0: ""}, progress=Progress(step=9, total=9, stopped=9)), Reason.SIGNAL, "step 9", Retry.ALWAYS),
    (Facts(0, True, {0: ""}, progress=Progress(step=5, total=9, stopped=5)), Reason.SIGNAL, "step 5", Retry.ALWAYS),
])
def test_reason_words_and_retry(facts: Facts, reason: Reason, words: str, retry: Retry) -> None:
    verdict = judge(facts)
    assert verdict.reason is reason and words in verdict.detail and verdict.retry is retry
    assert "ChildFailedError" not in verdict.detail
