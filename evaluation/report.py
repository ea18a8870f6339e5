"""One page of pictures and numbers: input, posterior mean, teacher, student and original of each face; nothing else.

Used by `python evaluate.py report`.
"""

import base64
import html

from evaluation.faces import degraded, find_faces
from evaluation.metrics import PictureMetrics
from evaluation.quality import CEILING, heading, load_models, methods, timed
from evaluation.tables import write_text
from plumbing import pictures
from plumbing.commands import say

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>DirectFlow: restored faces</title>
<style>body{{font:14px sans-serif;margin:1em}}td,th{{padding:4px;text-align:center;font-weight:normal}}
img{{width:{width}px;display:block}}td{{font-size:12px;color:#444}}</style>
<h1>Restored faces</h1><p>{caption}</p><table><tr>{header}</tr>
{rows}
</table></html>
"""


def report(data, checkpoints, out, *, level, ranges, seed, limit, device):
    """Writes one HTML page with all pictures in it: a row a face, a column a method, the numbers under each picture.

    out: the file. Returns the number of faces that could not be read. ValueError if `out` is a folder or no face is left.
    """
    if out.is_dir():
        raise ValueError(f"expected a file for the page, got the folder {out}: name a file in it")
    found, failed = find_faces(data, limit)
    pictures.make_folder(out.parent)
    students, teacher = load_models(checkpoints, device)
    columns, measure = (
        methods(students, teacher, [teacher.steps], device),
        PictureMetrics(("psnr", "ssim", "lpips"), device),
    )
    columns.pop(CEILING)
    size, rows = next(iter(students.values())).image_size, []
    for face in degraded(found, size, level, ranges, seed):
        cells = []
        for method in columns.values():
            x_hat, _ = timed(method, face, device)
            v = measure(x_hat, face.x)
            cells.append(cell(x_hat, f"PSNR {v['psnr']:.2f}<br>SSIM {v['ssim']:.3f}<br>LPIPS {v['lpips']:.3f}"))
        rows.append("<tr>" + "".join([*cells, cell(face.x, html.escape(face.name))]) + "</tr>")
    header = "".join(f"<th>{html.escape(c)}</th>" for c in [*columns, "original"])
    caption = html.escape(f"Degradation {heading(level, ranges, seed)}; {size} px.")
    page = PAGE.format(width=max(192, size // 2), caption=caption, header=header, rows="\n".join(rows))
    write_text(out, page)
    say(f"{out}: {len(rows)} faces")
    return failed


def cell(x, text):
    """A table cell with the picture x (3, S, S) inside the page itself and a text under it."""
    data = base64.b64encode(pictures.encode_image(x, ".png")).decode()
    return f'<td><img src="data:image/png;base64,{data}" alt="">{text}</td>'
