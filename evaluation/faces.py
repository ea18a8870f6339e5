"""What evaluate.py measures: clean faces, their degraded copies, and what a method makes of one (paper Sec. 4).

Usage: for name, seed, x, y in faces(find_faces("faces/val")[0], 128): x_hat, ms = apply_method(method, y, seed, "cpu")
"""

import time

import numpy as np
import torch
from tqdm import tqdm

import degrade
from plumbing import pictures
from plumbing.commands import complain
from plumbing.devices import synchronize


def find_faces(data, limit=None):
    """[(index, path), ...] of the first `limit` pictures of a folder, and the number of those that cannot be read.

    These are named on stderr. The index counts them too, so that the degradations of the other faces stay as they were.
    ValueError if no picture is left.
    """
    found, good = pictures.find_images([data])[:limit], []
    for i, path in enumerate(found):
        try:
            pictures.read_image(path)
            good.append((i, path))
        except (ValueError, OSError) as e:
            complain(e)
    if not good:
        got = f"{len(found)} that cannot be read" if found else "no picture"
        raise ValueError(f"expected clean faces in {data}, got {got}: name another folder")
    return good, len(found) - len(good)


def faces(found, size, level="default", ranges="difface", seed=0):
    """Clean faces and their degraded copies: yields (file name, seed + index, x, y), pictures (3, size, size) in [0, 1].

    found: from find_faces; level: "default" (drawn from `ranges`) or a name in degrade.LEVELS.
    """
    for i, path in tqdm(found, desc=level, disable=None):
        x = pictures.square(pictures.read_image(path), size)
        params = degrade.level(level, size, seed + i) if level != "default" else None
        params = params or degrade.sample(np.random.default_rng((seed, i, degrade.EVALUATION)), ranges, size)
        x = degrade.to_gray(x) if params.gray else x  # as in training: a gray copy has a gray target
        yield path.name, seed + i, x, degrade.apply(x, params)


@torch.inference_mode()
def apply_method(method, y, seed, device):
    """x_hat (1, 3, S, S) as a file would hold it, 8 bits a channel, and the milliseconds that the method took."""
    y = y[None].to(device)
    synchronize(device)
    start = time.perf_counter()
    x_hat = method(y, seed)
    synchronize(device)
    ms = (time.perf_counter() - start) * 1000
    return pictures.to_uint8(x_hat).float() / 255, ms
