"""launch compare: how jobs differ, how well each did, and what that took."""
from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from launcher import api, compare_views, plots, views
from launcher.commands._common import here, new_file, parser
from launcher.compare import panels
from launcher.errors import Failed

_COLUMNS = """
Of config, code, environment and inputs only what differs is shown; a config is that of the attempt which made the
job's newest steps (launch show tells what each restart changed). Inputs are told by the fingerprints that a job
records: of what other jobs gave it, of its data and rig. result: psnr: of training pictures, over the last 50
logged steps. val psnr, val ssim, val lpips: of views that were not put in, at the last evaluation; best: at the
best one; inputs: the PSNR of views that were put in, apart. copy, white, mean: what the picture put in, the white
picture and the mean training picture score. applied: updates, of those attempted; skipped: those that were not
finite or exploded. wall h: from the first start to the end, with the time between attempts, without that in which
the job had ended and nobody had restarted it; GPU h: of all attempts, each with the GPUs it held; useful: the
share of the wall time in steps that were kept, - where a program wrote no times of steps. curve: val psnr over
the evaluations, else the loss. --reach: the first time that the metric was there, coming from where most of
the jobs began; one of evaluations says more than one of single steps.
"""


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    found = api.compare(args.jobs, reach=args.reach, start=here())
    if args.plot:
        if not (drawn := panels(found.jobs)):
            raise Failed("nothing can be drawn: none of these jobs has written metrics")
        plots.png(args.plot, drawn)
    print(views.as_json(compare_views.as_object(found)) if args.json else compare_views.as_text(found))
    return 0


def _goal(text: str) -> tuple[str, float]:
    key, found, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (found and key and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{text!r} is not METRIC=NUMBER, as in val/psnr=20")
    return key, number


def _parser():
    p = parser("compare", "How jobs differ in config, code, environment and inputs, how well each did, what it took.")
    p.epilog = _COLUMNS
    p.add_argument("jobs", nargs="+", metavar="JOB",
                   help="an id, the beginning of one, a name, @last; a sweep by its name")
    p.add_argument("--reach", action="append", default=[], type=_goal, metavar="METRIC=VALUE",
                   help="steps, hours and GPU hours until the metric was there; may be repeated")
    p.add_argument("--plot", type=new_file(".png"), metavar="FILE.png", help="draw their curves as well")
    p.add_argument("--json", action="store_true", help="one object")
    return p
