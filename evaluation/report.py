"""One HTML page to look at: before | after of each face by every method, with the numbers beside them; nothing else.

Used by `python evaluate.py report`. The page is report.html, which lies beside this file, with the pictures in it: it needs no
network. The pictures are lossless, so its size grows with them: about 0.1 MB for 256 px.
"""

import base64
import json
import math
from pathlib import Path

from evaluation.quality import CEILING, timed
from evaluation.tables import DIGITS, TITLES, write_text
from plumbing.commands import say
from plumbing.files import make_folder
from plumbing.pictures import encode_image

PAGE = Path(__file__).with_suffix(".html")


def report(rows, tables, out, measures):
    """Writes the page to the file `out`. rows, tables: from quality.clean_faces or given_faces; measures: quality.Measures."""
    make_folder(out.parent)
    rows = {name: method for name, method in rows.items() if name != CEILING}
    ((_, title, found),) = tables
    faces, texts = [], []
    for i, face in enumerate(found):
        shown = {name: timed(method, face, measures.device)[0] for name, method in rows.items()}
        values = {name: measures.picture(x_hat, face.x) for name, x_hat in shown.items()}
        size = list(shown["input"].shape[:0:-1])  # width, height
        # null for the PSNR of a picture with itself, since JSON knows no infinity
        numbers = {name: [v if math.isfinite(v) else None for v in own.values()] for name, own in values.items()}
        faces.append({"name": face.name, "size": size, "values": numbers})
        shown |= {} if face.x is None else {"original": face.x}
        for k, x in enumerate(shown.values()):
            data = base64.b64encode(encode_image(x, ".webp")).decode()
            texts.append(f'<script type="text/plain" id="p{i}-{k}">{data}</script>')
    titles = {m: TITLES[m] for m in values["input"]}
    metrics = [dict(title=t, sign=1 if "↑" in t else -1, digits=DIGITS.get(m, 4)) for m, t in titles.items()]
    data = {"caption": f"{title}.", "methods": list(shown), "after": list(rows)[-1], "metrics": metrics, "faces": faces}
    data = json.dumps(data).replace("<", "\\u003c")  # so that no file name ends the script
    page = PAGE.read_text(encoding="utf-8").replace("DATA", data, 1).replace("<!-- PICTURES -->", "\n".join(texts), 1)
    write_text(out, page)
    say(f"{out}: {len(faces)} faces, {len(page) / 1e6:.1f} MB")
