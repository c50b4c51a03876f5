"""launch doctor: is it learning?"""
from __future__ import annotations

from collections.abc import Sequence

from launcher import api, doctor, views
from launcher.commands._common import columns, here, parser


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    found = api.diagnose(args.job, start=here())
    print(views.as_json(doctor.as_object(found)) if args.json else doctor.as_text(found, columns()))
    return 1 if found.sick else 0


def _parser():
    p = parser("doctor", "Is it learning? What is wrong with a job, the numbers, the likely cause and a command.")
    p.epilog = "Exit code 1 when there is an error. docs/doctor.md explains each rule."
    p.add_argument("job", nargs="?", default="@last", metavar="JOB", help="default: @last")
    p.add_argument("--json", action="store_true", help="one object")
    return p
