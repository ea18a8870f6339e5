"""The rows of the ablation (paper Tab. 3): how train.py makes each, how it is measured, and the table of all.

Used by `python evaluate.py ablation`. Every row has the same number of training steps, each seed a run of its own. A row is
compared with the full model pairwise, the same face and seed in both: what they share cancels, and small effects show.
"""

import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

from evaluation.faces import degraded, find_faces
from evaluation.metrics import values_of
from evaluation.quality import student_row
from evaluation.tables import TITLES, interval, markdown, spread, write_text
from plumbing.commands import say
from plumbing.devices import prepare
from plumbing.files import make_folder, write_csv
from plumbing.presets import ROOT, check_same, load_config, locate, newest_checkpoint
from plumbing.shards import read_meta
from student import Student

ABLATION = {  # row: options for both stages, steps of Stage A and of Stage B in units of --steps
    "full": ([], 1, 1),
    "baseline: no adapter, no SGCL (Sec. 4.1)": (["--adapter", "none", "--lambda-sgcl", "0"], 1, 1),
    "w/o adapter": (["--adapter", "none"], 1, 1),
    "w/o SGCL": (["--lambda-sgcl", "0"], 1, 1),
    "SGCL from the posterior mean": (["--sgcl-source", "mmse"], 1, 1),
    "w/o zero linear (scalar gate)": (["--adapter", "scalar-gate"], 1, 1),
    "w/o pixel losses (latent only)": (["--lambda-lpips", "0", "--lambda-l1", "0", "--lambda-sgcl", "0"], 1, 1),
    "entry: mean": (["--entry", "mean"], 1, 1),
    "entry: clean": (["--entry", "clean"], 1, 1),
    "entry: noised": (["--entry", "noised"], 1, 1),
    "Stage A only": ([], 2, 0),
    "Stage B only": ([], 0, 2),
}
CUMULATIVE = {  # Fig. 6: the same rows, in the order in which the parts are added
    "base": "baseline: no adapter, no SGCL (Sec. 4.1)",
    "+ adapter": "w/o SGCL",
    "+ SGCL = full": "full",
}


def ablation(data, cache, out, *, steps, seeds, batch, precision, ranges, limit, measures, device):
    """Trains every row of ABLATION with every seed and measures it; ablation.csv and ablation.md in `out` grow row by row.

    steps: training steps a stage; measures: quality.Measures. The same call again trains only what is missing. Returns the
    number of faces that could not be read. ValueError if none is left, or a run cannot be trained or has other settings.
    """
    found, failed = find_faces(data, limit=limit)
    make_folder(out)
    meta, lines, sets = read_meta(cache), [], {}
    note = (
        f"{2 * steps} steps of batch {batch} ({precision}) a row on {meta['count']} samples; seeds {seeds}; "
        f"{len(found)} faces, drawn from {ranges}, seed 0{measures.note()}. Mean over seeds (lowest to highest). "
        "The differences are paired by face and seed, with the 95 % interval of drawing faces and seeds with replacement.\n\n"
    )
    own = f"entry: {load_config(meta['preset'])['entry']}"  # the full model's, so no row of its own
    for row in [row for row in ABLATION if row != own]:
        for seed in seeds:
            folder = out / "".join(c if c.isalnum() else "_" for c in row) / f"seed_{seed}"
            common = ["--batch", batch, "--precision", precision, "--seed", seed]
            student = prepare(Student.load(train_row(folder, row, steps, cache, common), merge=True), device)
            methods = {row: student_row(student, "wavelet", device)}
            if row == "full":
                methods["w/o colour correction"] = student_row(student, "none", device)
            faces = degraded(found, student.image_size, "default", ranges, seed=0)  # whatever the training seed
            done, of_set = measures(methods, faces, out)
            for name, value in of_set.items():
                sets.setdefault(name, []).append(value)
            lines += [{"row": line.pop("method"), "seed": seed, **line} for line in done]
        text = note + ablation_table(lines, sets)
        write_csv(out / "ablation.csv", lines)
        write_text(out / "ablation.md", text)
    say(text)
    return failed


def train_row(folder, row, steps, cache, common):
    """Both stages of a row, as far as they are missing: the folder of its last checkpoint. common: more options of train.py."""
    options, a, b = ABLATION[row]
    train(folder / "stage_a", a * steps, cache, ["--stage", "A", *common, *options])
    if b:
        train(folder / "stage_b", b * steps, cache, ["--stage", "B", *common, *options], ["--init", folder / "stage_a"])
    return folder / ("stage_b" if b else "stage_a")


def train(folder, steps, cache, options, init=()):
    """Runs train.py until `folder` holds its last checkpoint; nothing to do where trained.json says that this was done.

    trained.json is written when train.py has ended well. It tells steps, options, cache and weights (`sources`). ValueError
    if it tells of others, or if train.py fails. Weights of a hub, and the code, are taken to be the same as before.
    """
    wanted, note = {"steps": steps, "options": list(map(str, options)), **sources(cache)}, folder / "trained.json"
    if note.is_file():
        check_same(json.loads(note.read_text()), wanted, f"the run in {folder}", "delete it")
        newest_checkpoint(folder)
        return
    command = [sys.executable, ROOT / "train.py", "--out", folder, "--steps", steps, "--cache", cache, *options, *init]
    command = list(map(str, command))
    if code := subprocess.run(command).returncode:
        raise ValueError(f"expected train.py to end well, got exit code {code} (see above): {' '.join(command)}")
    write_text(note, json.dumps(wanted, indent=1) + "\n")


def sources(cache):
    """sha256 of the cache's meta.json, which holds those of all shards, and of the weights in folders that its preset names."""
    meta = (Path(cache) / "meta.json").read_bytes()
    preset, weights = load_config(json.loads(meta)["preset"]), hashlib.sha256()
    for name in (preset["base"], preset["clip"]["name"], preset["dino"]["name"]):
        for file in sorted(Path(locate(name)).rglob("*.safetensors")):
            weights.update(file.read_bytes())
    return {"cache_sha256": hashlib.sha256(meta).hexdigest(), "weights_sha256": weights.hexdigest()}


def ablation_table(lines, sets):
    """Markdown: each measure's mean over seeds (lowest to highest), LPIPS minus the first row's with interval; Fig. 6's rows.

    lines: a dict a row, seed and face; sets: {row: [{measure of a set: value}, one a seed]}.
    """
    measured = [m for m in lines[0] if m in TITLES]
    paired = [m for m in measured if m.startswith("lpips")]
    values = values_of(lines, "row", measured)
    first, cells = next(iter(values.values())), {}
    for row, v in values.items():
        cells[row] = [spread([statistics.fmean(face) for face in v[m]], m) for m in measured]
        cells[row] += [spread([s[m] for s in sets[row]], m) for m in sets[row][0]]
        cells[row] += ["" if v is first else interval(v[m] - first[m], m, "+") for m in paired]
    titles = [TITLES[m] for m in (*measured, *next(iter(sets.values()))[0])]
    header = ["", *titles, *(f"{TITLES[m]} minus full's" for m in paired)]
    added = [[name, *cells[row]] for name, row in CUMULATIVE.items() if row in cells]
    whole = markdown(header, [[row, *c] for row, c in cells.items()])
    return f"{whole}\nFig. 6, cumulative:\n\n{markdown(header, added)}"
