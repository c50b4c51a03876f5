"""launch report: one page about a job."""
from __future__ import annotations

import os
from collections.abc import Sequence

from launcher import api
from launcher.commands._common import here, new_file, parser


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    print(os.path.relpath(api.report(args.job, out=args.output, start=here())))
    return 0


def _parser():
    p = parser("report", "One HTML page about a job that needs no network: findings, curves, pictures, where its "
                         "time went, code, config and inputs. Prints its name.")
    p.add_argument("job", nargs="?", default="@last", metavar="JOB", help="default: @last")
    p.add_argument("-o", "--output", type=new_file(".html"), metavar="FILE.html",
                   help="default: the job's id and .html")
    return p
