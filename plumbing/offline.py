"""How a cache comes to be on disk: settings first, shards written whole or not at all, meta.json last."""

import hashlib
import json
import os
import threading
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import features
from tqdm import tqdm

from plumbing import commands
from plumbing.files import READ, find_images, make_folder, write_bytes
from plumbing.pipeline import beside
from plumbing.presets import check_same
from plumbing.shards import read_records, settings_of, write_shard

MAX_SHARD = 256  # samples; about 120 MB at 512 px


def sources_in(data, out, limit):
    """Names, relative to the folder data, of its first `limit` pictures, those in out left aside."""
    if not data.is_dir():
        raise ValueError(f"expected a folder of pictures, got --data {data}: name an existing folder")
    made = os.path.realpath(out)  # unlike Path.resolve, no error for a link to itself
    paths = [path for path in find_images([data]) if not Path(os.path.realpath(path)).is_relative_to(made)]
    if not paths:
        raise ValueError(f"expected pictures ({', '.join(READ)}) in {data}, got none: name another folder")
    return [path.relative_to(data).as_posix() for path in paths[:limit]]


def listing(data, sources):
    """What tells one folder of pictures from another: how many, and the sha256 of their names and sizes."""
    names = [(name, (data / name).stat().st_size if (data / name).is_file() else None) for name in sources]
    return dict(pictures=len(sources), pictures_sha256=hashlib.sha256(json.dumps(names).encode()).hexdigest())


def versions():
    """The libraries on which the bytes of a cache depend."""
    known = dict(torch=torch.__version__, numpy=np.__version__, pillow=PIL.__version__)
    return known | {name: features.version(name) for name in ("jpg", "webp")}


def write_json(path, value):
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def begin(out, settings, rank):
    """Writes settings.json into a new cache, or compares with the one there; ValueError if they differ."""
    done = (out / "meta.json").exists()
    if not done:  # a finished one may well be on a disk that is read-only
        make_folder(out)
    if rank:
        wait_for([out / "settings.json"])
    before = settings_of(out)
    if before is None:
        if any(not path.name.endswith(".tmp") for path in out.iterdir()):
            raise ValueError(f"expected a new or empty folder or a cache, got {out}: choose another --out")
        return write_json(out / "settings.json", settings)
    # what is finished stays good when libraries change, or this program learns a setting
    known = {key: now for key, now in settings.items() if not (done and (key == "versions" or key not in before))}
    check_same(before, known, f"the cache in {out}", "delete it or change --out")


def make_shards(todo, make, settings, workers, rank):
    """todo: shard path -> its jobs. Batches are formed within a shard, made by `workers` threads, written in order.

    On the CPU each batch is computed by one thread, so that the number of threads splits no sum. A GPU has one batch at
    a time, while others are read, degraded and compressed.
    """
    lock, size = threading.Lock() if settings["device"] == "cuda" else nullcontext(), settings["batch"]
    batches = {path: [jobs[i : i + size] for i in range(0, len(jobs), size)] for path, jobs in todo.items()}
    made = beside(lambda batch: make(batch, settings, lock), chain(*batches.values()), workers)
    total, quiet = sum(map(len, todo.values())), rank > 0 or not todo
    with tqdm(total=total, unit=" samples", disable=quiet, smoothing=0.05) as bar:
        for path in todo:
            done = []
            for batch in batches[path]:
                done.append(next(made))
                bar.update(len(batch))
            write_shard(path, done)


def wait_for(paths):
    """Until all the files are there; torchrun ends this process if another one fails."""
    while not all(path.exists() for path in paths):
        time.sleep(0.1)


def summary(data, out, settings, paths):
    """meta.json's dict for the shards in paths. Removes what interruptions left. ValueError if there is no sample."""
    shards, skipped = [], {}
    for path in paths:
        records = read_records(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append(dict(file=path.name, count=len(records["samples"]), bytes=path.stat().st_size, sha256=digest))
        skipped |= dict(records["skipped"])
    count = sum(shard["count"] for shard in shards)
    if not count:
        raise ValueError(f"expected pictures in {data}, got {len(skipped)} that cannot be read: check the folder")
    for leftover in out.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    skipped = [dict(source=name, reason=reason) for name, reason in sorted(skipped.items())]
    return settings | dict(count=count, shards=shards, skipped=skipped)


def report(out, meta, made, seconds, workers):
    """Prints the last line, and the pictures that were left out. Returns the exit code."""
    size = sum(shard["bytes"] for shard in meta["shards"])
    line = f"{out}: {meta['count']} samples, {size / 1e6:.1f} MB, {size / meta['count'] / 1e3:.0f} kB each"
    if not seconds:
        line += ": already finished, nothing to do"
    elif made:
        hours = 70_000 * seconds / made / 3600
        cost = f"{hours:.1f} GPU-hours" if meta["device"] == "cuda" else f"{hours * workers:.1f} CPU-core-hours"
        line += f", {made / seconds:.2f} samples/s a process; 70,000 would take {cost}"
    commands.say(line)
    for skipped in meta["skipped"]:
        commands.complain(f"skipped {skipped['source']}: {skipped['reason']}")
    return commands.complain(f"{len(meta['skipped'])} of {meta['pictures']} pictures skipped") if meta["skipped"] else 0
