"""The plots of the paper's figures and tables, from CSVs and tokens: Fig. 1b and 2, Tab. 3, and Sec. 3.3.1's token.

A plot is the text of an SVG file (evaluation/svg.py). The CSVs are those that `evaluate.py quality` and `ablation` write.
"""

import numpy as np

from evaluation.metrics import mean_interval, values_of
from evaluation.quality import CEILING
from evaluation.svg import COLOURS, Axes, limits, svg, text
from plumbing.files import read_csv


def plane(path):
    """Fig. 1b and 2: each method of a quality.csv on the plane of PSNR and LPIPS, a cross of intervals, a panel a level."""
    lines = read_csv(path, ("level", "method", "face", "psnr", "lpips"))
    levels, marks = list(dict.fromkeys(line["level"] for line in lines)), []
    columns = min(2, len(levels))
    for i, level in enumerate(levels):
        own = [line for line in lines if line["level"] == level and line["method"] != CEILING]
        box = (70 + 470 * (i % columns), 40 + 370 * (i // columns), 380, 280)
        found = values_of(own, "method", ("psnr", "lpips"))
        methods = {name: [mean_interval(v["psnr"]), mean_interval(v["lpips"])] for name, v in found.items()}
        marks += plane_of(methods, box, f"degradation: {level}; numbers: the teacher's steps")
    return svg(20 + 470 * columns, 20 + 370 * -(-len(levels) // columns), marks)


def plane_of(methods, box, title):
    """The marks of one panel; methods: {name: [(mean, low, high) of PSNR, of LPIPS]}."""
    xs, ys = ([v for m in methods.values() for v in m[k]] for k in (0, 1))
    titles = (title, "PSNR, dB (right: less distortion)", "LPIPS (below: better to see)")
    a = Axes(box, limits(xs, 0.16), limits(ys), *titles)
    teacher = {name: m for name, m in methods.items() if name.startswith("teacher")}
    a.line(*zip(*((x, y) for (x, *_), (y, *_) in teacher.values()), strict=True), COLOURS[1], 1) if teacher else None
    kinds = {"input": COLOURS[6], "posterior": COLOURS[2], "teacher": COLOURS[1]}
    for name, ((x, *x_range), (y, *y_range)) in methods.items():
        colour = kinds.get(name.replace(",", "").split()[0], COLOURS[0])
        a.line(x_range, (y, y), colour)
        a.line((x, x), y_range, colour)
        a.dot(x, y, colour)
        short = name.split()[1] if name in teacher else name.removesuffix(" tiny")
        below, left = name in teacher, x > sum(a.x) / 2
        a.label(x, y, short, (-8 if left else 8, 16 if below else -6), "end" if left else "start", colour)
    return a.marks


def ablation_bars(path):
    """Tab. 3: each row of an ablation.csv minus its first, the full model: paired by face and seed, with intervals."""
    found = values_of(read_csv(path, ("row", "seed", "face", "psnr", "lpips")), "row", ("psnr", "lpips"))
    (_, full), *rows = found.items()
    names, height, marks = 310, 30 * len(rows), []
    for k, (metric, unit, better) in enumerate((("psnr", " dB", "right"), ("lpips", "", "left"))):
        differences = [mean_interval(v[metric] - full[metric]) for _, v in rows]
        title = f"{metric.upper()} minus the full model's {full[metric].mean():.4g}{unit}"
        x = limits([0, *(v for d in differences for v in d)])
        a = Axes((names + 390 * k, 40, 350, height), x, (len(rows), 0), title, f"better to the {better}", y_ticks=[])
        for i, (mean, low, high) in enumerate(differences):
            good, bad = (low > 0, high < 0) if better == "right" else (high < 0, low > 0)
            a.bar(0, mean, i + 0.2, i + 0.8, COLOURS[2] if good else COLOURS[1] if bad else COLOURS[6])
            a.line((low, high), (i + 0.5, i + 0.5), "currentColor")
        a.line((0, 0), a.y, "currentColor", 1)
        marks += a.marks
    marks += [text(names - 8, 40 + 30 * i + 19, name, "end") for i, (name, _) in enumerate(rows)]
    return svg(names + 770, height + 90, marks)


def principal_axes(tokens, first):
    """tokens (n, d) on their first two principal axes, (n, 2); an axis points to where `first` (n,) grows."""
    centred = tokens - tokens.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    u = centred @ axes[:2].T
    return u * np.where((u * (first - first.mean())[:, None]).sum(0) < 0, -1, 1)


def explained(u, values):
    """R^2 of the linear regression of values (n,) on u (n, 2): the share of their variance that the two axes tell."""
    design = np.column_stack([u, np.ones(len(u))])
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return 1 - left.var() / values.var()


def token_plot(tokens, parameters):
    """Sec. 3.3.1: tokens (n, d) of n degraded copies on two axes, for each of parameters {title: (n,) values} as colours."""
    u, marks = principal_axes(tokens, next(iter(parameters.values()))), []
    for k, (title, values) in enumerate(parameters.items()):
        title = f"{title}: {values.min():.2g} (blue) to {values.max():.2g} (red)"
        told = f"the two axes explain {100 * explained(u, values):.0f} % of it"
        a = Axes((40 + 280 * k, 40, 235, 235), limits(u[:, 0]), limits(u[:, 1]), title, told)
        ranks = values.argsort().argsort() / (len(values) - 1)
        for (x, y), r in zip(u, ranks, strict=True):
            a.dot(x, y, f"hsl({230 * (1 - r):.0f} 75% 45%)", 3.5)
        marks += a.marks
    return svg(40 + 280 * len(parameters), 335, marks)
