"""Quality of input, posterior mean, teacher and students on the same faces (paper Tab. 1, 2).

Used by `python evaluate.py quality`. Clean faces are degraded here, every method restores the copy, and each result is measured
as a file would hold it, 8 bits a channel.
"""

import statistics
import tempfile
from pathlib import Path

from evaluation.faces import apply_method, faces, find_faces
from evaluation.metrics import NO_REFERENCE, PAIRED, SETS, PictureMetrics, optional, set_metrics
from evaluation.tables import TITLES, interval, markdown, write_csv, write_text
from plumbing import pictures
from plumbing.commands import say
from plumbing.presets import locate
from restore import wavelet_color_fix
from student import Student, decode, encode
from teacher import PMRF

CEILING = "teacher through the VAE"  # the best that a student of this latent space can do at copying its target


def load_models(checkpoints, device):
    """The students by name and the teacher of the first one. ValueError if they do not all work at one picture size."""
    students = {str(name): Student.load(name).to(device) for name in checkpoints}
    sizes = {name: student.image_size for name, student in students.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"expected checkpoints of one picture size, got {sizes}: evaluate them one by one")
    config = next(iter(students.values())).config
    return students, PMRF.from_pretrained(locate(config["teacher"])).to(device)


def methods(students, teacher, steps):
    """The rows of a table: {name: function of y (1, 3, S, S) and a seed -> x_hat}."""
    rows = {"input": lambda y, seed: y, "posterior mean": lambda y, seed: teacher.posterior_mean(y)}
    for k in steps:
        rows[f"teacher, {k} step{'s' * (k > 1)}"] = lambda y, seed, k=k: teacher.restore(y, steps=k, seed=seed)
    for name, student in students.items():
        rows[f"student {name}"] = lambda y, seed, student=student: wavelet_color_fix(student(y), y)
    vae, k = next(iter(students.values())).vae, max(steps)
    rows[CEILING] = lambda y, seed: decode(vae, encode(vae, teacher.restore(y, steps=k, seed=seed)))
    return rows


def quality(data, checkpoints, out, *, steps, levels, ranges, seed, limit, metrics, device):
    """Writes quality.csv (a line a face and method) and quality.md (means with 95 % intervals over the faces) to `out`.

    data: folder of clean faces; levels: names for evaluation.faces; metrics: names in evaluation.metrics. Returns the number of
    faces that could not be read. ValueError if there is none left, or an optional package is missing.
    """
    for package, names in (("torch_fidelity", SETS), ("pyiqa", NO_REFERENCE)):
        if asked := sorted(set(names) & set(metrics)):
            optional(package, ", ".join(asked))  # before the work, not after it
    found, failed = find_faces(data, limit)
    students, teacher = load_models(checkpoints, device)
    rows, measure = methods(students, teacher, steps), PictureMetrics(metrics, device)
    size, lines, tables = next(iter(students.values())).image_size, [], []
    pictures.make_folder(out)
    for level in levels:
        with tempfile.TemporaryDirectory(prefix=".pictures_", dir=out) as folder:  # of this run and level alone
            folder, done = Path(folder), []
            for i, (name, own, x, y) in enumerate(faces(found, size, level, ranges, seed)):
                if not (lines or done):
                    for method in rows.values():
                        apply_method(method, y, own, device)  # warm-up: the first call is slower
                for row, method in rows.items():
                    x_hat, ms = apply_method(method, y, own, device)
                    values = measure(x_hat, x[None].to(device))
                    done.append({"level": level, "method": row, "face": name, **values, "ms": ms})
                    keep_for_sets(folder, row, i, x_hat[0], metrics)
                keep_for_sets(folder, "original", i, x, metrics)
            sets = {row: measure_sets(folder, row, metrics, device) for row in rows}
        title = f"## {heading(level, ranges, seed)}, {len(found)} faces at {size} px\n\n"
        tables.append(title + quality_table(done, sets, metrics))
        say(tables[-1])
        lines += done
        write_csv(out / "quality.csv", lines)
        write_text(out / "quality.md", "\n".join(tables))
    return failed


def heading(level, ranges, seed):
    """Which degradation, in words."""
    return (f"drawn from {ranges}" if level == "default" else f"level {level}") + f", seed {seed}"


def quality_table(lines, sets, wanted):
    """Markdown: a row a method, mean [low, high] of what is measured a face, the value of what is measured a set."""
    picture = [m for m in (*PAIRED, *NO_REFERENCE) if m in wanted]
    header = ["", *(TITLES[m] for m in (*picture, *next(iter(sets.values())))), TITLES["ms"]]
    table = []
    for method, values in sets.items():
        own = [line for line in lines if line["method"] == method]
        cells = [interval([line[m] for line in own], m) for m in picture]
        cells += [f"{v:.4f}" for v in values.values()]
        table.append([method, *cells, f"{statistics.median(line['ms'] for line in own):.0f}"])
    return markdown(header, table)


def keep_for_sets(folder, row, i, x, wanted):
    """Saves a picture where a measure of whole folders (FID, KID, precision) will want it."""
    if set(SETS) & set(wanted):
        target = folder / row.replace("/", "_") / f"{i:05d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_image(target, x)


def measure_sets(folder, row, wanted, device):
    sets = [m for m in SETS if m in wanted]
    return set_metrics(folder / row.replace("/", "_"), folder / "original", sets, device) if sets else {}
