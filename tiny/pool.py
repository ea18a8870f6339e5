"""The training pairs of the tiny model's parts: faces, augmented and degraded once, kept on disk (runs/pool).

hq.npy, lq.npy    (N, 3, S, S) uint8, S the preset's picture size, N = VIEWS a face; view 0 of each face is the plain picture
numbers.npy       (N, 4) float32, what the degradation token shall tell
NAME-sha.npy      what a trained network makes of the pictures (`derive`); sha names its weights
*.json            what each was made of, and how many rows are done: making them goes on after a kill
"""

import hashlib
import json
import math
from functools import partial

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image
from tqdm import tqdm

import degrade
from plumbing import files, pictures
from plumbing.devices import cores_a_process
from plumbing.pipeline import beside
from plumbing.presets import check_same, load_config
from plumbing.shards import weights_sha256

SIZE, VIEWS = load_config("tiny")["image_size"], 16
RANGES = ("difface", "gfpgan")  # of even and odd views: difface alone holds hardly any lightly degraded picture


# --- a pair -------------------------------------------------------------------------------------------------------------


def augment(picture, rng):
    """A PIL face -> uint8 (3, SIZE, SIZE): mirrored or not, turned by up to 6 degrees, scaled, shifted, colours varied."""
    side = picture.size[0]
    padded = Image.fromarray(np.pad(np.asarray(picture), ((side // 8,) * 2, (side // 8,) * 2, (0, 0)), mode="reflect"))
    centre = padded.size[0] / 2 + side * rng.uniform(-0.04, 0.04, 2)
    half = side / 2 * rng.uniform(0.9, 1.06)
    turned = padded.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC, center=tuple(centre))
    box = (centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half)
    x = np.asarray(turned.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box), dtype=np.float32)
    if rng.random() < 0.5:
        x = x[:, ::-1]
    gray, gain, contrast, colour = x.mean(2, keepdims=True), *rng.uniform(0.9, 1.1, 3)
    x = gray + colour * (x - gray)
    x = gain * (x.mean() + contrast * (x - x.mean()))
    return np.clip(np.rint(x), 0, 255).astype(np.uint8).transpose(2, 0, 1)


def degradation_numbers(params):
    """What the degradation token shall tell: log blur sigma, log downsampling, noise, JPEG quality, roughly in [-1, 1]."""
    blur = math.log(math.sqrt(params.sigma_x * params.sigma_y) + 0.1)
    return [blur, math.log(params.down), params.noise / 10 - 1, params.jpeg / 35 - 1.85]


def make_pair(picture, seed, face, view):
    """A square PIL picture, by (seed, face, view) alone -> (clean, degraded) uint8 (3, SIZE, SIZE), degradation_numbers."""
    rng = np.random.default_rng([seed, face, view])
    plain = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    x = torch.from_numpy((augment(picture, rng) if view else plain).copy()).float() / 255
    params = degrade.sample(rng, RANGES[view % len(RANGES)], SIZE)
    y = degrade.apply(x, params)
    x = degrade.to_gray(x) if params.gray else x
    return pictures.to_uint8(x).numpy(), pictures.to_uint8(y).numpy(), degradation_numbers(params)


def make_views(seed, numbered_path):
    """All pairs of one face: hq, lq (VIEWS, 3, SIZE, SIZE) uint8 and numbers (VIEWS, 4). (face, path): numbered_path."""
    face, path = numbered_path
    square = pictures.square(pictures.read_image(path), 2 * SIZE)  # turned at twice the size, where it blurs little
    picture = Image.fromarray(pictures.to_uint8(square).permute(1, 2, 0).numpy())
    hq, lq, numbers = zip(*(make_pair(picture, seed, face, view) for view in range(VIEWS)), strict=True)
    return {"hq": np.stack(hq), "lq": np.stack(lq), "numbers": np.float32(numbers)}


# --- arrays on disk -----------------------------------------------------------------------------------------------------


def fill(folder, record, made_of, n, rows_from):
    """Writes arrays of n rows, from the row on where an earlier call was stopped.

    rows_from(done): yields {name: rows}, those that follow the first `done`. record: the .json with made_of and the rows done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(record.read_text()) if record.is_file() else {**made_of, "rows": 0}
    done = before.pop("rows")
    check_same(before, made_of, f"the pool in {folder}", "delete that folder")
    for rows in rows_from(done) if done < n else ():
        for name, values in rows.items():
            shape = (n, *values.shape[1:])
            array = open_memmap(folder / f"{name}.npy", "r+" if done else "w+", values.dtype, shape)
            array[done : done + len(values)] = values
        done += len(values)
        files.write_bytes(record, json.dumps({**made_of, "rows": done}).encode())


class Pool:
    """The pairs of the faces in some folders, read by row; pictures as float32 in [0, 1]. Makes them if they are not there.

    A GPU with room for them holds the arrays, so that a training step waits for nothing.
    """

    def __init__(self, data, folder, seed, device):
        self.folder, self.device, self.seed, self.arrays = folder, device, seed, {}
        faces = [path for each in data for path in files.find_images([each])]
        if not faces:
            raise ValueError(f"expected face pictures in {', '.join(map(str, data))}, found none: name another folder")
        listing = json.dumps([(path.name, path.stat().st_size) for path in faces])
        made_of = dict(seed=seed, size=SIZE, views=VIEWS, sha256=hashlib.sha256(listing.encode()).hexdigest())
        self.faces, self.rows = len(faces), len(faces) * VIEWS
        fill(folder, folder / "pool.json", made_of, self.rows, partial(self.make, faces))

    def make(self, faces, done):
        todo = list(enumerate(faces))[done // VIEWS :]
        return tqdm(beside(partial(make_views, self.seed), todo, cores_a_process()), "pool", len(todo), unit=" faces")

    def array(self, name):
        if name not in self.arrays:
            array = torch.from_numpy(np.load(self.folder / f"{name}.npy", mmap_mode="c"))
            on_gpu = self.device.type == "cuda" and array.nbytes < torch.cuda.mem_get_info()[0] / 2
            self.arrays[name] = array.to(self.device) if on_gpu else array
        return self.arrays[name]

    def get(self, name, index):
        """Rows of an array, in the order of index (which is random: parts of a batch are random too)."""
        array = self.array(name)
        rows = array[index.to(array.device, non_blocking=True)].to(self.device, non_blocking=True)
        return rows.float() / 255 if rows.dtype == torch.uint8 else rows.float()

    def batch(self, n, step):
        """n rows of n different faces (all of them, if there are fewer): a function of (seed, step)."""
        rng = np.random.default_rng([self.seed, step])
        faces = rng.permutation(self.faces)[:n]
        return torch.from_numpy(faces * VIEWS + rng.integers(VIEWS, size=len(faces)))

    @torch.no_grad()
    def derive(self, name, source, network, function, n=128):
        """The name of the array of function(pictures), which depends on the network's weights; made if it is not there."""
        sha256 = weights_sha256(network)
        name = f"{name}-{sha256[:12]}"

        def rows_from(done):
            for i in tqdm(range(done, self.rows, n), f"pool: {name}"):
                x = self.get(source, torch.arange(i, min(i + n, self.rows)))
                yield {name: function(x).cpu().numpy()}

        fill(self.folder, self.folder / f"{name}.json", {"sha256": sha256}, self.rows, rows_from)
        return name
