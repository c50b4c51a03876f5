"""The HTML of a report: one file, no network, light and dark, usable with the keyboard alone."""
from __future__ import annotations

import base64
import html
import json
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from launcher.details import changed_files, inputs
from launcher.doctor import curve_of, lost
from launcher.past_configs import in_words
from launcher.plots import INKS, Curve, svg
from launcher.views import ending, lasting, number

if TYPE_CHECKING:
    from launcher.report import Picture, Report

_FIGURES = 18
_FIRST = ("loss", "psnr", "ssim", "lpips")
_LAST = ("lr", "grad_norm", "it_s")
_UNINTERESTING = ("applied", "attempted", "epoch", "objects", "images", "skipped")
_BESIDE = re.compile(r"_(input|white|mean|copy|other|vae|chance|best|low|high)$")
_HINT = "Tab to a curve, then ← and → read it off; dotted lines are restarts, shaded steps are those of a finding."
_WORDS = {"useful": "steps that count", "replay": "steps done again after a restart", "evaluation": "evaluation",
          "checkpoint": "checkpoints", "stall": "pauses that nothing explains", "start": "start-up",
          "finish": "after the last step", "running": "running; its output has no times of steps",
          "between": "between attempts", "queue": "waiting for its first start"}
_COLOURS = {"COMPLETED": "good", "RUNNING": "good", "FAILED": "bad", "OUT_OF_MEMORY": "bad", "NODE_FAIL": "bad",
            "TIMEOUT": "bad", "ok": "good", "warning": "warn", "error": "bad", "sick": "bad"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; media-src data:"


def page(found: Report) -> str:
    job = found.diagnosis.job
    title = f"{job.id}" + (f" · {job.name}" if job.name else "")
    sections = {"findings": _findings(found), "curves": _curves(found), "pictures": _pictures(found),
                "time": _time(found), "attempts": _attempts(found), "provenance": _provenance(found)}
    shown = {name: body for name, body in sections.items() if body}
    menu = "".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in shown)
    body = "".join(f'<section id="{name}"><h2>{name.capitalize()}</h2>{text}</section>' for name, text in shown.items())
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_e(title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f'<style>{_beside("report.css")}</style></head><body>'
            '<a class="skip" href="#findings">To the findings</a>'
            f'<header>{_header(found, title)}<nav aria-label="Sections">{menu}</nav></header><main>{body}</main>'
            f'<footer>written {_e(_when(time.time()))} by launch report</footer>'
            f'<script>{_beside("report.js")}</script></body></html>\n')


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)


def _when(t: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t)) if t else ""


# --- header, findings ---------------------------------------------------------------------------------------

def _header(found: Report, title: str) -> str:
    job, goodput = found.diagnosis.job, found.diagnosis.goodput
    step = "" if job.step is None else f"{job.step:,}" + (f" of {job.total:,}" if job.total else "")
    told = "useful" in goodput and goodput["wall"]
    useful = f"{100 * goodput['useful'] / goodput['wall']:.0f} %" if told else "-" if goodput else ""
    facts = {"stage": job.stage, "node": job.place or job.node, "GPUs": len(job.gpus) or "", "step": step,
             "loss": number(job.loss), "started": _when(job.started_at), "ended": _when(job.ended_at),
             "wall time": lasting(goodput["wall"]) if goodput else "", "useful": useful,
             "attempts": len(found.details.attempts) or ""}
    cells = "".join(f"<div>{_rows({name: _e(value)})}</div>" for name, value in facts.items() if value != "")
    pills = "".join(_pill(word) for word in (job.state, found.diagnosis.health) if word != "unknown")
    why = "" if job.state == "COMPLETED" else _e(_why(job.reason, job.detail))
    return f'<h1>{_e(title)} {pills}</h1><p>{why}</p><dl class="facts">{cells}</dl>'


def _pill(word: str) -> str:
    return f'<span class="pill {_COLOURS.get(word, "")}">{_e(word)}</span>'


def _why(reason: str | None, detail: str | None) -> str:
    return ": ".join(filter(None, ending(reason or "", (detail or "").strip().split("\n", 1)[0])))


def _findings(found: Report) -> str:
    diagnosis = found.diagnosis
    if not diagnosis.findings:
        seen = "Nothing is wrong that can be seen in " + diagnosis.source if diagnosis.source != "nothing" else \
            "Nothing can be seen of its learning: it wrote no metrics, and no progress rule found a step in its output"
        return f"<p>{_e(seen)}.</p>"
    return "".join(_finding(one) for one in diagnosis.findings)


def _finding(one: dict[str, Any]) -> str:
    first, last = one["first"], one["last"]
    where = "" if first is None else f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    rows = {"why it matters": _e(one["why"]), "likely cause": _e(one["cause"]),
            "what to do": f'<code>{_e(one["fix"])}</code>', "more": _e(one["page"])}
    return (f'<article class="finding {_COLOURS.get(one["severity"], "")}">'
            f'<h3>{_pill(one["severity"])} {_e(one["rule"])} <small>{where}</small></h3>'
            f'<p class="what">{_e(one["what"])}</p><dl>{_rows(rows)}</dl></article>')


def _rows(rows: dict[str, str]) -> str:
    """HTML beside its name, of those that say something."""
    return "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows.items() if text)


# --- curves -------------------------------------------------------------------------------------------------

def grouped(curves: Iterable[str]) -> dict[str, list[str]]:
    """Metrics that belong on one drawing: loss with val/loss, val/psnr with what it is held against."""
    groups: dict[str, list[str]] = {}
    for key in curves:
        name = _BESIDE.sub("", key.removeprefix("val/"))
        if name not in _UNINTERESTING:
            groups.setdefault(name, []).append(key)
    order = [*_FIRST, *(name for name in groups if name not in (*_FIRST, *_LAST)), *_LAST]
    return {name: sorted(groups[name], key=len) for name in order if name in groups}


def _curves(found: Report) -> str:
    diagnosis = found.diagnosis
    marks: dict[str, list[tuple[int, int]]] = {}
    for one in diagnosis.findings:
        key = curve_of(one["rule"], diagnosis.curves)
        if key and one["first"] is not None and one["first"] < one["last"] and one["severity"] != "info":
            marks.setdefault(key, []).append((one["first"], one["last"]))
    figures = []
    for name, keys in list(grouped(diagnosis.curves).items())[:_FIGURES]:
        shown = {key: diagnosis.curves[key] for key in keys}
        level = next((one["level"] for one in diagnosis.findings if one.get("level")), None) if name == "loss" else None
        figures.append(_figure(name, shown, svg(name, shown, [band for key in keys for band in marks.get(key, ())],
                                                diagnosis.resumes, diagnosis.job.step, level)))
    return f'<p class="hint">{_HINT}</p><div class="figures">{"".join(figures)}</div>' if figures else ""


def _figure(name: str, curves: dict[str, Curve], drawing: str) -> str:
    legend = "".join(f'<span><i style="background:{ink}"></i>{_e(key)}</span>' for ink, key in zip(cycle(INKS), curves))
    data = {key: [[one[0], float(f"{one[2]:.5g}")] for one in curve] for key, curve in curves.items()}
    return (f'<figure tabindex="0"><figcaption>{_e(name)} <output aria-live="polite"></output></figcaption>'
            f'{drawing}<p class="legend">{legend}</p>'
            f'<script type="application/json">{_json(data)}</script></figure>')


def _json(data: object) -> str:
    """That cannot end the element it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


# --- pictures, time, attempts -------------------------------------------------------------------------------

def _pictures(found: Report) -> str:
    shown = "".join(_picture(one) for one in found.pictures)
    missing = "".join(f"<li>{_e(words)}</li>" for words in found.left_out)
    return (f'<div class="pictures">{shown}</div>' if shown else "") + \
        (f"<p>Too large for this page:</p><ul>{missing}</ul>" if missing else "")


def _picture(one: Picture) -> str:
    source = f"data:{one.kind};base64,{base64.b64encode(one.content).decode()}"
    name = PurePosixPath(one.path)
    step = re.fullmatch(r"step-0*(\d+)", name.stem)
    words = f"evaluation at step {int(step[1] or 0):,}" if step else name.name
    if one.kind.startswith("video/"):
        inside = f'<video controls loop muted playsinline src="{source}" aria-label="{_e(words)}"></video>'
    else:
        inside = f'<img src="{source}" alt="{_e(words)}">'
    return f'<figure>{inside}<figcaption>{_e(words)}</figcaption></figure>'


def _time(found: Report) -> str:
    parts = lost(found.diagnosis.goodput)
    if not parts:
        return ""
    bar = "".join(f'<i class="t-{part}" style="flex:{share:.4f}"></i>' for part, _, share in parts)
    rows = [f'<td><i class="key t-{part}"></i>{_WORDS[part]}</td><td>{how_long}</td><td>{100 * share:.1f} %</td>'
            for part, how_long, share in parts]
    return f'<div class="bar" aria-hidden="true">{bar}</div>{_table(("what for", "time", "share"), rows)}'


def _attempts(found: Report) -> str:
    rows = []
    for one in found.details.attempts:
        env = one["env"] or {}
        took = lasting(one["ended_at"] - one["started_at"]) if one["ended_at"] and one["started_at"] else ""
        cells = (one["n"], _when(one["started_at"]), took, one["resume_step"], one["step"], len(one["gpus"]) or None,
                 env.get("hostname"), env.get("torch"), _why(one["reason"], one["detail"]))
        rows.append("".join(f'<td>{"" if cell is None else _e(cell)}</td>' for cell in cells))
    titles = ("attempt", "started", "took", "from step", "to step", "GPUs", "host", "torch", "ended")
    changed = "".join(f"<li>{_e(words)}</li>" for one in found.details.attempts if (words := in_words(one)))
    return (_table(titles, rows) if rows else "") + \
        (f"<p>Changed from the attempt before:</p><ul>{changed}</ul>" if changed else "")


def _table(titles: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "</tr><tr>".join(rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table></div>'


def _provenance(found: Report) -> str:
    details, spec = found.details, found.details.spec or {}
    code = details.code
    facts = {"run directory": details.status.run_dir,
             "command": shlex.join(spec["argv"]) if spec else "started by hand",
             "commit": (code.get("git_sha") or "") + (" with uncommitted changes" if code.get("dirty") else ""),
             "snapshot": (code.get("digest") or "")[:16], "by": spec.get("submitted_by") or ""}
    cells = _rows({name: f"<code>{_e(value)}</code>" if value else "" for name, value in facts.items()})
    taken = [f"{one['reference']}: {one['path']} (sha256 {one['fingerprint'][:16]}, of {one['job']})"
             for one in details.inputs]
    lines = "".join(f"<li><code>{_e(one)}</code></li>" for one in [*taken, *inputs(details)])
    made = "" if details.config_of is None else f" of attempt {details.config_of}, which made its newest steps"
    folded = {f"config.yaml{made}": details.config or "", "uncommitted changes": _changes(code.get("patch") or ""),
              "packages": _packages(details.attempts)}
    blocks = "".join(f"<details><summary>{_e(name)}</summary><pre>{_e(text)}</pre></details>"
                     for name, text in folded.items() if text)
    return f'<dl class="plain">{cells}</dl>' + (f"<h3>Inputs</h3><ul>{lines}</ul>" if lines else "") + blocks


def _changes(patch: str) -> str:
    return "\n".join(f"{name}  +{added} -{removed}" for name, (added, removed) in changed_files(patch).items())


def _packages(attempts: Sequence[dict[str, Any]]) -> str:
    env = next((one["env"] for one in reversed(attempts) if one["env"]), None)
    return json.dumps(env, indent=1, ensure_ascii=False) if env else ""
