"""launch compare: how jobs differ, and how well each did."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher import api, compare_views, plots, views
from launcher.commands._common import here, parser
from launcher.compare import panels
from launcher.errors import Failed

_COLUMNS = """
psnr: of training pictures, over the last 50 logged steps. val psnr, val ssim, val lpips: of views that were
not put in, at the last evaluation; best: at the best one; inputs: the PSNR of views that were put in, apart.
copy, white, mean: what the picture put in, the white picture and the mean training picture score. applied:
updates, of those attempted; skipped: those that were not finite or exploded. curve: val psnr over the
evaluations, else the loss.
"""


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    found = api.compare(args.jobs, start=here())
    if args.plot:
        if not (drawn := panels(found.jobs)):
            raise Failed("nothing can be drawn: none of these jobs has written metrics")
        plots.png(args.plot, drawn)
    print(views.as_json(compare_views.as_object(found)) if args.json else compare_views.as_text(found))
    return 0


def _parser():
    p = parser("compare", "How the configs of jobs differ, and how well each did.")
    p.epilog = _COLUMNS
    p.add_argument("jobs", nargs="+", metavar="JOB",
                   help="an id, the beginning of one, a name, @last; a sweep by its name")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw their curves as well")
    p.add_argument("--json", action="store_true", help="one object")
    return p
