"""One HTML page of a training: the curves of its log.jsonl, its grid of pictures, its settings; nothing else.

Used by `python evaluate.py report --run RUN`. Only whole lines of the log and finished checkpoints are read, so the page can be
made at any time while train.py goes on. It needs no network.
"""

import base64
import json
from html import escape

from evaluation.svg import COLOURS, Axes, limits, svg, text
from evaluation.tables import write_text
from plumbing.commands import say
from plumbing.presets import load_config
from plumbing.runs import read_log

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0 auto; max-width: 1100px; padding: 1rem 1.25rem; font: 15px/1.45 system-ui, sans-serif;
        background: light-dark(#fff, #131518); color: light-dark(#1a1d21, #e6e8eb); }}
.paper {{ fill: none; }}
svg, img {{ max-width: 100%; height: auto; }}
td {{ padding: 0.1rem 1rem 0.1rem 0; vertical-align: top; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
{curves}
{grid}
<h2>Settings</h2>
{settings}
"""
TERMS = {"lat": "latent", "lpips": "LPIPS", "l1": "L1", "sgcl": "SGCL"}  # of Eq. 6


def training_page(run, out):
    """Writes the page of the run's folder to the file `out`. FileNotFoundError, ValueError if there is no line of a log."""
    lines = read_log(run / "log.jsonl", ("step", "seconds", "lr", "loss", "raw", "weighted"))
    if not lines:
        raise ValueError(f"expected a step in {run / 'log.jsonl'}, got none yet: wait for --log-every steps")
    try:
        config = load_config(run)
    except FileNotFoundError:
        config = {}  # before the first checkpoint
    last, grid = lines[-1], run / "grid.png"
    of = f" of {config['steps']}" if "steps" in config else ""
    summary = f"Step {last['step']}{of}, loss {last['loss']:.4f}, {sum(line['seconds'] for line in lines):.0f} s."
    picture = "<p>No picture yet: the first checkpoint brings one.</p>"
    if grid.is_file():
        data = base64.b64encode(grid.read_bytes()).decode()
        picture = f'<h2>LQ | student | X†, at the last checkpoint</h2>\n<img alt="" src="data:image/png;base64,{data}">'
    rows = "".join(f"<tr><td>{escape(k)}<td>{escape(json.dumps(v))}" for k, v in config.items())
    settings = f"<table>{rows}</table>" if rows else "<p>None yet: the first checkpoint brings them.</p>"
    title, plots = escape(f"Training {run}"), curves(lines, config.get("batch"))
    page = PAGE.format(title=title, summary=summary, curves=plots, grid=picture, settings=settings)
    write_text(out, page)
    say(f"{out}: {len(lines)} logged steps, {len(page) / 1e6:.1f} MB")


def curves(lines, batch):
    """SVG: each term of Eq. 6 raw, all of them weighted, the learning rate, and the pace where the batch is known."""
    at = [(40 + 350 * (i % 3) + 30, 40 + 260 * (i // 3), 280, 170) for i in range(7)]
    marks = []
    for box, (name, title) in zip(at, TERMS.items(), strict=False):
        marks += curve(box, f"{title}, raw", series(lines, "raw", name))
    weighted = {name: points for name in TERMS if (points := series(lines, "weighted", name))}
    marks += together(at[4], "weighted, as summed in Eq. 6", weighted)
    marks += curve(at[5], "learning rate", [(line["step"], line["lr"]) for line in lines])
    steps = [0, *(line["step"] for line in lines)]
    pace = [(b, (b - a) / line["seconds"] * (batch or 1)) for a, b, line in zip(steps, steps[1:], lines, strict=False)]
    marks += curve(at[6], "samples a second" if batch else "steps a second", pace)
    return svg(1080, 800, marks)


def series(lines, kind, name):
    """[(step, value), ...] of a term, where it was computed: SGCL is in some steps only, and 0 in the others."""
    return [(line["step"], line[kind][name]) for line in lines if line["raw"].get(name)]


def curve(box, title, points):
    if not points:
        return [text(box[0], box[1] - 10, f"{title}: not computed")]
    return together(box, f"{title}: {points[-1][1]:.4g}", {"": points})


def together(box, title, named):
    """The marks of several curves {name: [(step, value), ...]} in one box, with a legend."""
    xs, ys = zip(*(point for points in named.values() for point in points), strict=True)
    a = Axes(box, limits(xs), limits([0, *ys]), title, "step")
    for i, (name, points) in enumerate(named.items()):
        a.line(*zip(*points, strict=True), COLOURS[i])
        if len(points) == 1:
            a.dot(*points[0], COLOURS[i], 3)
        a.marks.append(text(box[0] + box[2], box[1] + 14 + 16 * i, TERMS.get(name, ""), "end", COLOURS[i]))
    return a.marks
