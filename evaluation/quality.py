"""Quality of input, posterior mean, teacher, students and pictures from elsewhere on the same faces (paper Tab. 1, 2).

Used by `python evaluate.py quality`, and by the ablation. Measured is what restore.py would write, 8 bits a channel.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from evaluation.faces import degraded, find_faces, given
from evaluation.metrics import PictureMetrics, set_metrics, values_of
from evaluation.tables import TITLES, interval, markdown, write_text
from plumbing import pictures
from plumbing.commands import optional, say
from plumbing.devices import prepare, synchronize
from plumbing.files import make_folder, write_csv
from plumbing.presets import SETS, locate
from restore import restore
from student import Student, decode, encode
from teacher import PMRF

CEILING = "teacher through the VAE"  # the best that a student of this latent space can do at copying its target


# --- the rows of a table: {name: function of a face -> x_hat (3, H, W)} -----------------------------------------------


def load_models(checkpoints, device, precision):
    """The students by name and the teacher of the first one. ValueError if they do not all work at one picture size."""
    students = {str(name): prepare(Student.load(name, merge=True), device, precision) for name in checkpoints}
    sizes = {name: student.image_size for name, student in students.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"expected checkpoints of one picture size, got {sizes}: evaluate them one by one")
    config = next(iter(students.values())).config
    return students, prepare(PMRF.from_pretrained(locate(config["teacher"])), device, precision)


def methods(students, teacher, steps, device):
    """Input, posterior mean, teacher at each K of steps, the students, and the teacher's picture through the VAE."""
    first, last = next(iter(students.values())), max(steps)

    def row(model):
        return lambda face: restore(lambda y: model(y, face.seed), first.image_size, [face.y], "none", device)[0]

    rows = {"input": lambda face: face.y, "posterior mean": row(lambda y, _: teacher.posterior_mean(y))}
    for k in steps:
        rows[f"teacher, {k} step{'s' * (k > 1)}"] = row(lambda y, seed, k=k: teacher.restore(y, steps=k, seed=seed))
    for name, student in students.items():
        rows[f"student {name}"] = student_row(student, "wavelet", device)
    rows[CEILING] = row(lambda y, s: decode(first.vae, encode(first.vae, teacher.restore(y, steps=last, seed=s))))
    return rows


def student_row(student, color_fix, device):
    """The one step and a colour correction of restore.py."""
    return lambda face: restore(student, student.image_size, [face.y], color_fix, device)[0]


# --- what is compared on what: rows, [(level, title, number of faces, faces), ...], number of pictures left out ----------


def clean_faces(data, checkpoints, *, steps, levels, ranges, seed, limit, device, precision):
    """Clean faces of a folder, brought to the models' size and degraded here, once for each of levels."""
    found, failed = find_faces(data, limit=limit)
    students, teacher = load_models(checkpoints, device, precision)
    size, tables = next(iter(students.values())).image_size, []
    for level in levels:
        drawn = f"drawn from {ranges}" if level == "default" else f"level {level}"
        title = f"{drawn}, seed {seed}, {len(found)} faces at {size} px"
        tables.append((level, title, len(found), degraded(found, size, level, ranges, seed)))
    return methods(students, teacher, steps, device), tables, failed


def given_faces(lq, hq, restored, checkpoints, *, steps, seed, limit, device, precision):
    """Given pictures: `lq` degraded, `hq` their originals or None, `restored` folders of another program's results.

    Without checkpoints there is no teacher and no student.
    """
    found, failed = find_faces(lq, hq, restored, limit)
    models = load_models(checkpoints, device, precision) if checkpoints else None
    rows = methods(*models, steps, device) if models else {"input": lambda face: face.y}
    rows |= {f"restored {f}": lambda face, k=k: pictures.read_image(face.restored[k]) for k, f in enumerate(restored)}
    title = f"{lq}, {len(found)} pictures" + f", originals in {hq}" * bool(hq) + f", seed {seed}" * bool(models)
    return rows, [("given", title, len(found), given(found, lq, hq, seed))], failed


# --- faces x rows -> numbers ------------------------------------------------------------------------------------------


class Measures:
    """What is measured: `metrics` (names in evaluation.metrics) and the identity network's, if one is given.

    reference: folder for the measures of sets; None: the originals. ValueError if an optional package is missing.
    """

    def __init__(self, metrics, device, reference=None, identity=None):
        self.sets, self.reference, self.device = [m for m in SETS if m in metrics], reference, device
        if self.sets:
            optional("torch_fidelity", ", ".join(self.sets), "0.4")  # before the work, not after it
        self.picture, self.warm = PictureMetrics(metrics, device, identity), set()

    def __call__(self, rows, faces, out):
        """rows: {name: function of a Face}; out: folder for temporary files.

        Returns ([{"method", "face", measures ..., "ms"}, ...], {method: measures of its set}).
        """
        lines = []
        with tempfile.TemporaryDirectory(prefix=".pictures_", dir=out) as scratch:
            folders = {row: Path(scratch, row.replace("/", "_")) for row in ("original", *rows)}
            for i, face in enumerate(faces):
                kept = {} if self.reference else {"original": face.x}
                for row, method in rows.items():
                    if row not in self.warm:
                        timed(method, face, self.device)  # the first call is slower
                        self.warm.add(row)
                    kept[row], ms = timed(method, face, self.device)
                    values = self.picture(kept[row], face.x)
                    lines.append({"method": row, "face": face.name, **values, "ms": round(ms, 3)})
                for row, x in kept.items() if self.sets else ():
                    pictures.write_image(make_folder(folders[row]) / f"{i:05d}.png", x)
            compared = (self.reference or folders["original"], self.sets, self.device, scratch)
            return lines, {row: set_metrics(folders[row], *compared) if self.sets else {} for row in rows}

    def note(self):
        """What the measures of sets compare with, for a table's heading."""
        return f"; {', '.join(self.sets)} against {self.reference or 'these originals'}" if self.sets else ""


@torch.inference_mode()
def timed(method, face, device):
    """x_hat (3, H, W) as a file would hold it, 8 bits a channel, and the milliseconds that the method took."""
    synchronize(device)
    start = time.perf_counter()
    x_hat = method(face)
    synchronize(device)
    return pictures.to_uint8(x_hat).float() / 255, (time.perf_counter() - start) * 1000


# --- the tables -------------------------------------------------------------------------------------------------------


def quality(rows, tables, out, measures):
    """quality.csv (a line a face and method) and quality.md (means with 95 % intervals) in `out`; both grow table by table."""
    make_folder(out)
    lines, texts = [], []
    for level, title, _, faces in tables:
        done, sets = measures(rows, faces, out)
        texts.append(f"## {title}{measures.note()}\n\n{quality_table(done, sets)}")
        say(texts[-1])
        lines += [{"level": level, **line} for line in done]
        write_csv(out / "quality.csv", lines)
        write_text(out / "quality.md", "\n".join(texts))


def quality_table(lines, sets):
    """Markdown: a row a method, mean [low, high] of what is measured a face, the value of what is measured a set."""
    measured = [m for m in lines[0] if m in TITLES and m != "ms"]
    header = ["", *(TITLES[m] for m in (*measured, *next(iter(sets.values())), "ms"))]
    table = []
    for method, values in values_of(lines, "method", [*measured, "ms"]).items():
        cells = [interval(values[m], m) for m in measured] + [f"{v:.4f}" for v in sets[method].values()]
        table.append([method, *cells, f"{np.median(values['ms']):.0f}"])
    return markdown(header, table)
