"""The offline pass (paper Sec. 3.2, Fig. 3 left): degrade, ask the teacher, encode, and keep it in shards on disk.

    y = degrade(x)                                         Sec. 4, Datasets
    X† = T(y), in K Euler steps                            Eq. 4, the target of Eq. 5
    z_y = s E(2y - 1), z_target = s E(2X† - 1)             Sec. 3.2, the space bridge

The latents are those of the stored 8-bit pictures. The bytes of a cache depend on the pictures, the settings and the library
versions alone (settings.json has them), not on the number of processes or on interruptions.

    settings.json            what the cache is made with; written first, compared when the command runs again
    shard_00000.safetensors  z_lq (that is z_y), z_target: (n, C, h, w) float16. y, X† as lossless WebP, end to end in y_bytes
                             and x_bytes (uint8), sample j from y_offsets[j] to y_offsets[j + 1] (int64). In its metadata
                             "records", JSON: source, degradation parameters and teacher seed of each sample
    preview.png, meta.json   the first samples (LQ, X†, HQ); the settings, count, shards with their sha256, skipped pictures

Usage: python cache.py --data FACES --out cache                  the same command again goes on where it was
"""

import argparse
import sys
from pathlib import Path

from plumbing import commands
from plumbing.presets import RANGES


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Degrade pictures, restore with the teacher, cache latents (Sec. 3.2).")
    add, whole = p.add_argument, commands.whole
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="DIR", help="folder of sharp face pictures, searched recursively")
    what.add_argument("--check", type=Path, metavar="CACHE", help="verify a finished cache instead of making one")
    add("--out", type=Path, default="cache", metavar="DIR", help="the cache to make or go on with (default cache)")
    add("--preset", choices=("tiny", "paper"), default="tiny", help="networks and image size (default tiny)")
    add("--steps", type=whole(), default=25, metavar="K", help="Euler steps of the teacher (default 25)")
    add("--seed", type=whole(0), default=0, help="seed of degradations and teacher noise (default 0)")
    add("--limit", type=whole(), metavar="N", help="use the first N pictures only")
    add("--repeats", type=whole(), default=1, metavar="R", help="degradations a picture (default 1)")
    add("--ranges", nargs="+", choices=RANGES, default=["difface"],
        help="degradation (default difface, the teacher's); several take turns over the repeats")  # fmt: skip
    add("--min-side", type=whole(), metavar="PX", help="least short side of a picture (default half the preset's)")
    add("--batch", type=whole(), default=8, metavar="N", help="samples the teacher restores at once (default 8)")
    add("--precision", choices=("fp32", "bf16"), default="fp32",
        help="of the teacher (default fp32, on a GPU with TF32 products, as in PMRF's code)")  # fmt: skip
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: cuda if there is one")
    args = p.parse_args(argv)
    if args.repeats < len(args.ranges):
        p.error(f"argument --ranges: expected no more names than --repeats, got {len(args.ranges)} and {args.repeats}")
    return args


if __name__ == "__main__":
    # at once: threads may be minutes from the end of a batch, and no file is ever half written
    ARGS = commands.begin(parse_args, "the same command goes on from here", at_once=True)

import dataclasses
import hashlib
import json
import time

import numpy as np
import torch
from PIL import Image, ImageDraw

import degrade
from plumbing import devices, offline, shards
from plumbing.files import read_file
from plumbing.pictures import decode_picture, encode_image, read_image, resize, square, to_uint8, write_image
from plumbing.presets import load_config, locate
from plumbing.published import load_vae
from plumbing.shards import CacheDataset, read_meta, weights_sha256
from student import decode, encode
from teacher import PMRF

# --- Sec. 3.2, a batch of samples -----------------------------------------------------------------------------------------


def degrade_picture(data, name, index, repeat, settings):
    """(y (3, S, S) float32, its record) of the picture data / name; random by (seed, index, repeat) only.

    Raises ValueError or OSError if the picture cannot be read, or is too small to be a training face.
    """
    blob, size = read_file(data / name), settings["image_size"]
    x = decode_picture(blob, name).x
    if min(x.shape[1:]) < settings["min_side"]:
        need = f"a short side of {settings['min_side']} px or more"
        raise ValueError(f"expected {need}, got {x.shape[2]}x{x.shape[1]} in {name}: --min-side 1 takes it")
    x = to_uint8(square(x, size)) / 255
    rng = np.random.Generator(np.random.PCG64((settings["seed"], index, repeat)))
    ranges = settings["ranges"][repeat % len(settings["ranges"])]["name"]
    params = degrade.sample(rng, ranges, size)
    record = dict(source=name, sha256=hashlib.sha256(blob).hexdigest(), repeat=repeat, seed=int(rng.integers(2**31)))
    return degrade.apply(x, params), record | {"params": dataclasses.asdict(params)}


def make_batch(teacher, vae, data, jobs, settings, lock):
    """Degrades, restores and encodes a batch; jobs: (source, index, repeat) each.

    Returns dict(samples, skipped, y, x) of lists (records; source and reason; WebP bytes), and z_lq, z_target if any.
    """
    pairs, skipped = [], []
    for job in jobs:
        try:
            pairs.append(degrade_picture(data, *job, settings))
        except (ValueError, OSError) as e:
            skipped.append((job[0], str(e).replace(str(data / job[0]), job[0])))
    if not pairs:
        return dict(samples=[], skipped=skipped, y=[], x=[])
    y, records = torch.stack([y for y, _ in pairs]), [record for _, record in pairs]
    device = next(teacher.parameters()).device
    with lock, torch.inference_mode():
        x_target = teacher.restore(y.to(device), settings["steps"], [record["seed"] for record in records])  # X†, Eq. 4
        x_target = to_uint8(finite(x_target, "the teacher's restoration")).cpu() / 255  # as it is stored
        # the space bridge
        z_y, z_target = (finite(encode(vae, v.to(device)).half(), "a latent").cpu() for v in (y, x_target))
    y, x = ([encode_image(v, ".webp") for v in pictures] for pictures in (y, x_target))
    return dict(samples=records, skipped=skipped, y=y, x=x, z_lq=z_y, z_target=z_target)


def finite(x, what):
    if not torch.isfinite(x).all():
        raise ValueError(f"expected finite values, got NaN or infinity in {what}: check the weights of the preset")
    return x


# --- the whole cache ------------------------------------------------------------------------------------------------------


def settings_for(
    teacher, vae, data, sources, preset, image_size, seed, steps, ranges, repeats, batch,
    precision="fp32", min_side=None, device="cpu",
):  # fmt: skip
    """All that decides what is in the cache, as a JSON dict. sources: names in data; ranges: names in degrade.RANGES."""
    settings = dict(preset=preset, image_size=image_size, seed=seed, steps=steps, sigma_s=teacher.sigma_s)
    settings |= dict(ranges=[{"name": name} | dataclasses.asdict(degrade.RANGES[name]) for name in ranges])
    settings |= dict(min_side=image_size // 2 if min_side is None else min_side)
    # whole batches; small enough for some processes to share a small set, and for an interruption to cost little
    shard_size = max(1, min(offline.MAX_SHARD, len(sources) * repeats // 32) // batch) * batch
    settings |= dict(repeats=repeats, batch=batch, shard_size=shard_size)
    settings |= offline.listing(data, sources)
    settings |= dict(teacher_sha256=weights_sha256(teacher), vae_sha256=weights_sha256(vae))
    settings |= dict(device=device, precision=precision, versions=offline.versions())
    return json.loads(json.dumps(settings))


def build(teacher, vae, data, sources, out, settings, workers=1, rank=0, world=1):
    """Makes those of this rank's shards that are missing. Rank 0 then waits for the others and finishes the cache.

    data, out: Path; sources: names relative to data. Returns (meta on rank 0, else None; samples made; seconds).
    Raises ValueError if out holds something else or a cache of other settings, OSError if it cannot be written.
    """
    offline.begin(out, settings, rank)
    if (out / "meta.json").exists():
        return None if rank else read_meta(out), 0, 0.0
    jobs = [(name, index, repeat) for repeat in range(settings["repeats"]) for index, name in enumerate(sources)]
    size = settings["shard_size"]
    plan = {out / f"shard_{i // size:05d}.safetensors": jobs[i : i + size] for i in range(0, len(jobs), size)}
    todo = {path: plan[path] for path in list(plan)[rank::world] if not path.exists()}
    start = time.perf_counter()
    offline.make_shards(todo, lambda *args: make_batch(teacher, vae, data, *args), settings, workers, rank)
    made, seconds = sum(map(len, todo.values())), time.perf_counter() - start
    if rank:
        return None, made, seconds
    offline.wait_for(plan)
    meta = offline.summary(data, out, settings, plan)
    write_image(out / "preview.png", preview(CacheDataset(out, meta), data))
    offline.write_json(out / "meta.json", meta)
    return meta, made, seconds


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


def check(folder, meta, vae):
    """Verifies a finished cache; yields one line a fault. See shards.check."""
    device = next(vae.parameters()).device
    return shards.check(folder, meta, lambda z: decode(vae, z.to(device)).clamp(0, 1).cpu(), degrade.Params)


# --- the command ----------------------------------------------------------------------------------------------------------


def load_networks(preset):
    """(teacher, VAE, image size) of a preset, on the CPU."""
    config = load_config(preset)
    return PMRF.from_pretrained(locate(config["teacher"])), load_vae(config), config["image_size"]


def work(args):
    device = devices.choose_device(args.device, known=("cuda", "cpu"))
    if args.check is not None:
        return verify(args.check, device)
    (rank, world), workers = devices.processes(), devices.cores_a_process()
    sources = offline.sources_in(args.data, args.out, args.limit)
    teacher, vae, image_size = load_networks(args.preset)
    options = (args.preset, image_size, args.seed, args.steps, args.ranges, args.repeats, args.batch)
    settings = settings_for(teacher, vae, args.data, sources, *options, args.precision, args.min_side, device.type)
    teacher, vae = devices.prepare(teacher, device, args.precision), devices.prepare(vae, device, "fp32")
    meta, made, seconds = build(teacher, vae, args.data, sources, args.out, settings, workers, rank, world)
    return 0 if rank else offline.report(args.out, meta, made, seconds, workers)


def verify(folder, device):
    meta = read_meta(folder)
    vae = load_vae(load_config(meta["preset"])).to(device)
    failed = sum(map(commands.complain, list(check(folder, meta, vae))))  # a list: the bar ends before the lines begin
    if not failed:
        commands.say(f"{folder}: {meta['count']} samples in {len(meta['shards'])} shards, all as they were written")
    return 1 if failed else 0


def main(args):
    advice = "use a smaller --batch (the cache depends on it: a new --out), or --device cpu"
    return commands.run(work, args, memory=advice)


if __name__ == "__main__":
    sys.exit(main(ARGS))
