"""One HTML page to look at: before | after of each face by every method, with the numbers beside them; nothing else.

Used by `python evaluate.py report`. The page is report.html, which lies beside this file, with the pictures in it: it needs no
network. It stays below MAX_BYTES: where lossless pictures are too many, they are compressed, but measured they are before that.
"""

import base64
import io
import json
import math
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

from evaluation.quality import CEILING, timed
from evaluation.tables import DIGITS, TITLES, write_text
from plumbing.commands import say
from plumbing.files import make_folder
from plumbing.pictures import to_uint8

MAX_BYTES = 100e6
PAGE = Path(__file__).with_suffix(".html")


def report(rows, tables, out, measures):
    """Writes the page to the file `out`. rows, tables: from quality.clean_faces or given_faces; measures: quality.Measures."""
    make_folder(out.parent)
    rows = {name: method for name, method in rows.items() if name != CEILING}
    ((_, title, count, found),) = tables
    limit = 0.74 * MAX_BYTES / (count * (len(rows) + 1))  # a picture; in base64 three bytes are four
    faces, texts, qualities = [], [], [None, 95, 90, 80, 65, 50, 30]
    for i, face in enumerate(found):
        shown = {name: timed(method, face, measures.device)[0] for name, method in rows.items()}
        values = {name: measures.picture(x_hat, face.x) for name, x_hat in shown.items()}
        size = list(shown["input"].shape[:0:-1])  # width, height
        # null for the PSNR of a picture with itself, since JSON knows no infinity
        numbers = {name: [v if math.isfinite(v) else None for v in own.values()] for name, own in values.items()}
        faces.append({"name": face.name, "size": size, "values": numbers})
        shown |= {} if face.x is None else {"original": face.x}
        for k, x in enumerate(shown.values()):
            data = base64.b64encode(compress(x, limit, qualities)).decode()
            texts.append(f'<script type="text/plain" id="p{i}-{k}">{data}</script>')
    titles = {m: TITLES[m] for m in values["input"]}
    metrics = [dict(title=t, sign=1 if "↑" in t else -1, digits=DIGITS.get(m, 4)) for m, t in titles.items()]
    caption = f"{title}." + f" Pictures compressed, down to WebP's quality {qualities[0]}." * bool(qualities[0])
    data = {"caption": caption, "methods": list(shown), "after": list(rows)[-1], "metrics": metrics, "faces": faces}
    data = json.dumps(data).replace("<", "\\u003c")  # so that no file name ends the script
    page = PAGE.read_text(encoding="utf-8").replace("DATA", data, 1).replace("<!-- PICTURES -->", "\n".join(texts), 1)
    write_text(out, page)
    say(f"{out}: {len(faces)} faces, {len(page) / 1e6:.1f} MB")


def compress(x, limit, qualities):
    """x (3, H, W) as WebP of at most `limit` bytes, in the first of `qualities` (None: lossless) that does it, or the last.

    What is too large is dropped from `qualities`, so that the next picture does not try it again.
    """
    picture = to_pil_image(to_uint8(x))
    while True:
        f = io.BytesIO()
        picture.save(f, "WEBP", lossless=qualities[0] is None, quality=qualities[0] or 20, method=2)
        if len(f.getvalue()) <= limit or len(qualities) == 1:
            return f.getvalue()
        qualities.pop(0)
