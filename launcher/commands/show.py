"""launch show: everything known about a job."""
from __future__ import annotations

from collections.abc import Sequence

from launcher import api, details, views
from launcher.commands._common import here, parser


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    found = api.show(args.job, start=here())
    print(views.as_json(details.as_object(found)) if args.json else details.as_text(found))
    return 0


def _parser():
    p = parser("show", "All that is known about a job: command, code, config, attempts, why it ended.")
    p.add_argument("job", nargs="?", default="@last", metavar="JOB", help="default: @last")
    p.add_argument("--json", action="store_true", help="one object")
    return p
