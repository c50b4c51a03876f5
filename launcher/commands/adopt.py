"""launch adopt: a program that runs already becomes a job."""
from __future__ import annotations

from collections.abc import Sequence

from launcher import api, sentences
from launcher.commands._common import add_progress, here, parser, tell
from launcher.errors import Interrupted


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        job = api.adopt(args.process, name=args.name, log=args.log, progress=args.progress, start=here())
    except KeyboardInterrupt:
        raise Interrupted("\nwhether it was adopted is not known; the program itself goes on",
                          hint="see: launch status --rescan") from None
    tell(sentences.adopted(job))
    print(job.id)
    return 0


def _parser():
    p = parser("adopt", "Take a program that was started by hand (nohup, tmux) under status, logs, progress, kill and "
                        "restart. It is not touched. Prints the job's id and nothing else on stdout.")
    p.add_argument("process", metavar="NODE:PID", help="any process of it; launch ps NODE lists them")
    p.add_argument("--name", metavar="X", help="a name for the job, unique among those not ended")
    p.add_argument("--log", metavar="FILE",
                   help="the file on the node that it writes to; default: where its stdout goes")
    add_progress(p, "the log")
    return p
