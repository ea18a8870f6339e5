"""The offline pass (paper Sec. 3.2, Fig. 3 left): degrade, ask the teacher, encode, and keep it in shards on disk.

    y = degrade(x),   X† = T(y) in K Euler steps (Eq. 4-5),   z_y = s E(2y - 1), z_target = s E(2X† - 1): the space bridge

The latents are those of the stored 8-bit pictures. What a cache holds follows from the pictures, the settings and the
versions of the libraries (all in `settings.json`), whatever the number of processes, and however often it was interrupted:
a shard is written whole or not at all, and `meta.json` last.

    settings.json            what the cache is made with; written first, compared when the command runs again
    shard_00000.safetensors  z_lq, z_target: (n, C, h, w) float16. y, x_target as lossless WebP, end to end in y_bytes and
                             x_bytes (uint8), sample j from y_offsets[j] to y_offsets[j + 1] (int64). In its metadata
                             "records", JSON: source, degradation parameters and teacher seed of each sample
    preview.png, meta.json   the first samples (LQ, X†, HQ); the settings, count, shards with their sha256, skipped pictures

Usage: python cache.py --data FACES --out cache                  the same command again goes on where it was
       torchrun --nproc_per_node=8 cache.py --data FACES --out cache --preset paper
       python cache.py --check cache
       CacheDataset("cache")[0]["z_lq"]
"""

import argparse
import os
import signal
import sys


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="Degrade pictures, restore them with the teacher, cache latents (Sec. 3.2)."
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="DIR", help="folder of sharp face pictures, searched recursively")
    what.add_argument("--check", metavar="CACHE", help="verify a finished cache instead of making one")
    p.add_argument("--out", default="cache", metavar="DIR", help="the cache to make or go on with (default cache)")
    p.add_argument("--preset", choices=("tiny", "paper"), default="tiny", help="networks and image size (default tiny)")
    p.add_argument("--steps", type=int, default=25, metavar="K", help="Euler steps of the teacher (default 25)")
    p.add_argument("--seed", type=int, default=0, help="seed of degradations and teacher noise (default 0)")
    p.add_argument("--limit", type=int, metavar="N", help="use the first N pictures only")
    p.add_argument("--repeats", type=int, default=1, metavar="R", help="degradations a picture (default 1)")
    ranges = ("difface", "gfpgan", "codeformer", "codeformer-large")
    p.add_argument("--ranges", nargs="+", choices=ranges, default=["difface"],
                   help="degradation (default difface, the teacher's); several take turns over the repeats")  # fmt: skip
    p.add_argument("--batch", type=int, default=8, metavar="N", help="samples the teacher restores at once (default 8)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one")
    args = p.parse_args(argv)
    for name, low in (("steps", 1), ("seed", 0), ("limit", 1), ("repeats", 1), ("batch", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            p.error(f"argument --{name}: expected {low} or more, got {getattr(args, name)}")
    if args.repeats < len(args.ranges):
        p.error(f"argument --ranges: expected no more names than --repeats, got {len(args.ranges)} and {args.repeats}")
    return args


def interrupted(*_):
    os.write(2, b"\ncache.py: interrupted; the same command goes on from here\n")
    os._exit(130)  # at once: threads may be minutes from the end of a batch, and no file is ever half written


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported, so that -h answers at once
    signal.signal(signal.SIGINT, interrupted)

import dataclasses
import hashlib
import json
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, features
from tqdm import tqdm

import degrade
from plumbing.commands import enough_memory
from plumbing.pictures import (
    decode_image,
    encode_image,
    find_images,
    make_folder,
    read_image,
    resize,
    square,
    to_uint8,
    write_bytes,
    write_image,
)
from plumbing.shards import CacheDataset, check, read_meta, read_records, settings_of, write_shard

MAX_SHARD = 256  # samples; about 120 MB at 512 px


# ---------------------------------------------------------------------------------------------------- a batch, a shard


def degrade_picture(data, name, index, repeat, settings):
    """(y (3, S, S) float32, its record) of the picture data / name; random by (seed, index, repeat) only.

    Raises ValueError or OSError if the picture cannot be read.
    """
    if (data / name).exists() and not (data / name).is_file():
        raise ValueError(
            f"expected a file, got {name}, which is none"
        )  # to open a named pipe would be to wait for ever
    blob, size = (data / name).read_bytes(), settings["image_size"]
    x = to_uint8(square(decode_image(blob, name), size)) / 255
    rng = np.random.Generator(np.random.PCG64((settings["seed"], index, repeat)))
    ranges = settings["ranges"][repeat % len(settings["ranges"])]["name"]
    params = degrade.sample(rng, ranges, size)
    record = dict(source=name, sha256=hashlib.sha256(blob).hexdigest(), repeat=repeat, seed=int(rng.integers(2**31)))
    return degrade.apply(x, params), record | {"params": dataclasses.asdict(params)}


def make_batch(teacher, vae, data, jobs, settings, lock):
    """Degrades, restores and encodes a batch; jobs: (source, index, repeat) each.

    Returns dict(samples, skipped, y, x) of lists (records; source and reason; WebP bytes), and z_lq, z_target if any.
    """
    from student import encode  # here and below, because data workers import this file, and need no networks

    pairs, skipped = [], []
    for job in jobs:
        try:
            pairs.append(degrade_picture(data, *job, settings))
        except (ValueError, OSError) as e:
            skipped.append((job[0], e.strerror or str(e) if isinstance(e, OSError) else str(e)))
    if not pairs:
        return dict(samples=[], skipped=skipped, y=[], x=[])
    y, records = torch.stack([y for y, _ in pairs]), [record for _, record in pairs]
    device = next(teacher.parameters()).device
    with lock, torch.inference_mode():
        # to be checked on a GPU against fp32: X† may differ by 0.5 grey levels on average, no more (a CPU: 0.25, tiny)
        with torch.autocast("cuda", torch.bfloat16, enabled=settings["precision"] == "bf16"):
            x_hat = teacher.restore(y.to(device), settings["steps"], [record["seed"] for record in records])
        x = to_uint8(finite(x_hat, "the teacher's restoration")).cpu() / 255  # X†, as it is stored
        z_lq, z_target = (finite(encode(vae, v.to(device)).half(), "a latent").cpu() for v in (y, x))
    y, x = ([encode_image(v, ".webp") for v in batch] for batch in (y, x))
    return dict(samples=records, skipped=skipped, y=y, x=x, z_lq=z_lq, z_target=z_target)


def finite(x, what):
    if not torch.isfinite(x).all():
        raise ValueError(f"expected finite values, got NaN or infinity in {what}: check the weights of the preset")
    return x


# ----------------------------------------------------------------------------------------------------- the whole cache


def settings_for(teacher, vae, data, sources, preset, image_size, seed, steps, ranges, repeats, batch):
    """All that decides what is in the cache, as a JSON dict. sources: names in data; ranges: names in degrade.RANGES."""
    device = next(teacher.parameters()).device.type
    listing = [(name, (data / name).stat().st_size if (data / name).is_file() else None) for name in sources]
    settings = dict(preset=preset, image_size=image_size, seed=seed, steps=steps, sigma_s=teacher.sigma_s)
    settings |= dict(ranges=[{"name": name} | dataclasses.asdict(degrade.RANGES[name]) for name in ranges])
    settings |= dict(repeats=repeats, batch=batch)
    # whole batches; small enough for some processes to share a small set, and for an interruption to cost little
    settings["shard_size"] = max(1, min(MAX_SHARD, len(sources) * repeats // 32) // batch) * batch
    settings |= dict(pictures=len(sources), pictures_sha256=hashlib.sha256(json.dumps(listing).encode()).hexdigest())
    settings |= dict(teacher_sha256=weights_sha256(teacher), vae_sha256=weights_sha256(vae))
    settings |= dict(device=device, precision="bf16" if device == "cuda" else "fp32")
    versions = dict(torch=torch.__version__, numpy=np.__version__, pillow=PIL.__version__)
    settings["versions"] = versions | {name: features.version(name) for name in ("jpg", "webp")}
    return json.loads(json.dumps(settings))


def weights_sha256(module):
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def write_json(path, value):
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def begin(out, settings, rank):
    """Writes settings.json into a new cache, or compares with the one there; ValueError if they differ."""
    if not (out / "meta.json").exists():  # a finished one may well be on a disk that is read-only
        make_folder(out)
    while rank and not (out / "settings.json").exists():
        time.sleep(0.1)
    before = settings_of(out)
    if before is None:
        if any(not path.name.endswith(".tmp") for path in out.iterdir()):
            raise ValueError(f"expected a new or empty folder or a cache, got {out}: choose another --out")
        return write_json(out / "settings.json", settings)
    done = (out / "meta.json").exists()  # what is finished stays good when libraries change
    keys = [key for key in settings if before.get(key) != settings[key] and not (done and key == "versions")]
    if keys:
        was = ", ".join(f"{key} {before.get(key)} (now {settings[key]})" for key in keys)
        raise ValueError(f"expected the settings of the cache in {out}, got others: {was}: delete it or change --out")


def build(teacher, vae, data, sources, out, settings, workers=1, rank=0, world=1):
    """Makes this rank's shards, as far as they are missing; rank 0 then waits for the others and finishes the cache.

    data, out: Path; sources: names relative to data. Returns (meta, None unless rank is 0; samples made; seconds).
    Raises ValueError if out holds something else or a cache of other settings, OSError if it cannot be written.
    """
    begin(out, settings, rank)
    if (out / "meta.json").exists():
        return None if rank else read_meta(out), 0, 0.0
    size, n = settings["shard_size"], len(sources)
    jobs = [(name, index, repeat) for repeat in range(settings["repeats"]) for index, name in enumerate(sources)]
    paths = [out / f"shard_{k:05d}.safetensors" for k in range(-(-n * settings["repeats"] // size))]
    todo = {paths[k]: jobs[k * size :][:size] for k in range(rank, len(paths), world) if not paths[k].exists()}
    start = time.perf_counter()
    make_shards(todo, lambda *args: make_batch(teacher, vae, data, *args), settings, workers, rank)
    seconds = time.perf_counter() - start
    while not rank and not all(path.exists() for path in paths):  # torchrun ends this process if another one fails
        time.sleep(0.1)
    return None if rank else finish(data, out, settings, paths), sum(map(len, todo.values())), seconds


def make_shards(todo, make, settings, workers, rank):
    """todo: shard path -> its jobs. Batches are formed within a shard, made by `workers` threads, written in order.

    On the CPU each batch is computed by one thread, so that the number of threads splits no sum. A GPU has one batch at
    a time, while others are read, degraded and compressed.
    """
    lock, batch = threading.Lock() if settings["device"] == "cuda" else nullcontext(), settings["batch"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    bar = tqdm(total=sum(map(len, todo.values())), unit=" samples", disable=bool(rank or not todo), smoothing=0.05)
    try:
        queue = deque(
            (path, deque(jobs[i : i + batch] for i in range(0, len(jobs), batch))) for path, jobs in todo.items()
        )
        queue = deque((path, deque(pool.submit(make, jobs, settings, lock) for jobs in parts)) for path, parts in queue)
        while queue:
            path, parts = queue.popleft()
            done = []
            while parts:
                done.append(parts.popleft().result())  # popped, so that what is written is not kept
                bar.update(len(done[-1]["samples"]) + len(done[-1]["skipped"]))
            write_shard(path, done)
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(threads)


def finish(data, out, settings, paths):
    """Removes what interruptions left, writes preview.png and, as the last file, meta.json. Returns the dict in it."""
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
    meta = settings | dict(count=count, shards=shards, skipped=skipped)
    write_image(out / "preview.png", preview(CacheDataset(out, meta), data))
    write_json(out / "meta.json", meta)
    return meta


def preview(dataset, data, n=8, size=256):
    """Contact sheet (3, 20 + n size, 3 size) of the first n samples: columns LQ, X†, HQ."""
    header = Image.new("RGB", (3 * size, 20), "white")
    for column, text in enumerate(("LQ", "teacher", "HQ")):
        ImageDraw.Draw(header).text((column * size + 8, 4), text, fill="black")
    rows = [torch.from_numpy(np.array(header)).permute(2, 0, 1) / 255]
    for i in range(min(n, len(dataset))):
        y, x_target, hq = dataset[i]["y"], dataset[i]["x_target"], read_image(data / dataset.record(i)["source"])
        rows.append(torch.cat([resize(x, (size, size)) for x in (y, x_target, square(hq, size))], 2))
    return torch.cat(rows, 1)


# ------------------------------------------------------------------------------------------------------------- command


def choose_device(name, local_rank=0):
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device, got none: use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False  # the same kernels in every run
    return torch.device("cuda", local_rank)


def load_networks(preset, device):
    """(teacher, VAE, image size) of a preset, on device."""
    from student import load_config, load_vae, locate
    from teacher import PMRF

    config = load_config(preset)
    teacher = PMRF.from_pretrained(locate(config["teacher"])).to(device).requires_grad_(False)
    return teacher, load_vae(config).to(device), config["image_size"]


def sources_in(data, out, limit):
    """Names, relative to the folder data, of its first `limit` pictures, those in out left aside."""
    if not data.is_dir():
        raise ValueError(f"expected a folder of pictures, got --data {data}: name an existing folder")
    paths = [path for path in find_images([data]) if out.resolve() not in path.resolve().parents]
    if not paths:
        raise ValueError(f"expected pictures (png, jpg, webp) in {data}, got none: name another folder")
    return [path.relative_to(data).as_posix() for path in paths[:limit]]


def main(args):
    rank, world, local, local_world = (
        int(os.environ.get(key, default))
        for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    device = choose_device(args.device, local)
    if args.check is not None:
        return main_check(args.check, device)
    data, out = Path(args.data), Path(args.out)
    sources = sources_in(data, out, args.limit)
    teacher, vae, image_size = load_networks(args.preset, device)
    options = (args.preset, image_size, args.seed, args.steps, args.ranges, args.repeats, args.batch)
    settings = settings_for(teacher, vae, data, sources, *options)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, min(8, cores // local_world))
    meta, made, seconds = build(teacher, vae, data, sources, out, settings, workers, rank, world)
    return 0 if rank else report(out, meta, made, seconds, workers)


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
    print(line)
    for skipped in meta["skipped"]:
        print(f"cache.py: skipped {skipped['source']}: {skipped['reason']}", file=sys.stderr)
    if meta["skipped"]:
        print(f"cache.py: {len(meta['skipped'])} of {meta['pictures']} pictures skipped", file=sys.stderr)
    return 1 if meta["skipped"] else 0


def main_check(folder, device):
    meta = read_meta(folder)  # before the imports, which take seconds
    from student import load_config, load_vae

    faults = list(check(folder, meta, load_vae(load_config(meta["preset"])).to(device)))
    for fault in faults:
        print(f"cache.py: {fault}", file=sys.stderr)
    if not faults:
        print(f"{folder}: {meta['count']} samples in {len(meta['shards'])} shards, all as they were written")
    return 1 if faults else 0


if __name__ == "__main__":
    try:
        with enough_memory("a batch", "use a smaller --batch (the cache depends on it: a new --out), or --device cpu"):
            sys.exit(main(ARGS))
    except (ValueError, OSError) as e:
        print(f"cache.py: {e}", file=sys.stderr)
        sys.exit(1)
