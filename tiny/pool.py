"""The training pairs of the tiny model's parts: faces at 128 px, augmented and degraded once, kept on disk (runs/pool).

hq.npy, lq.npy    (N, 3, 128, 128) uint8, N = VIEWS a face; view 0 of each face is the plain picture
numbers.npy       (N, 4) float32, what the degradation token shall tell
pool.json         what the pool was made of; the last file written
mmse.npy ...      what trained parts make of the pictures (`derive`), float16
"""

import hashlib
import json
import math

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import degrade
from plumbing import pictures

SIZE, VIEWS = 128, 16
RANGES = ("difface", "gfpgan")  # of even and odd views: difface alone holds hardly any lightly degraded picture


def augment(picture, rng):
    """A PIL face -> uint8 (3, 128, 128): mirrored or not, turned by up to 6 degrees, scaled, shifted, colours varied."""
    side = picture.size[0]
    padded = Image.fromarray(np.pad(np.asarray(picture), ((side // 8,) * 2, (side // 8,) * 2, (0, 0)), mode="reflect"))
    centre = padded.size[0] / 2 + side * rng.uniform(-0.04, 0.04, 2)
    half = side / 2 * rng.uniform(0.9, 1.06)
    turned = padded.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC, center=tuple(centre))
    box = (centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half)
    x = np.asarray(turned.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box), dtype=np.float64)
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
    """One view of a square PIL picture: (clean, degraded) uint8 (3, 128, 128) and the degradation's numbers.

    A function of (seed, face, view) and the picture alone. A gray sample has a gray target, as in the cache.
    """
    rng = np.random.default_rng([seed, face, view])
    plain = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    x = torch.from_numpy((augment(picture, rng) if view else plain).copy()).float() / 255
    params = degrade.sample(rng, RANGES[view % len(RANGES)], SIZE)
    y = degrade.apply(x, params)
    x = degrade.to_gray(x) if params.gray else x
    return pictures.to_uint8(x).numpy(), pictures.to_uint8(y).numpy(), degradation_numbers(params)


def make_pool(faces, folder, seed):
    """Writes hq.npy, lq.npy and numbers.npy from the pictures `faces`, VIEWS pairs of each."""
    pairs = []
    for face, path in enumerate(tqdm(faces, desc="pool")):
        square = pictures.square(pictures.read_image(path), 512)
        picture = Image.fromarray(pictures.to_uint8(square).permute(1, 2, 0).numpy())
        pairs += [make_pair(picture, seed, face, view) for view in range(VIEWS)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("hq", "lq", "numbers"), zip(*pairs, strict=True), strict=True):
        np.save(folder / f"{name}.npy", np.stack(rows) if name != "numbers" else np.float32(rows))


class Pool:
    """The pairs of a folder of faces, read by index; pictures as float32 in [0, 1]. Makes them if they are not there."""

    def __init__(self, data, folder, seed, device):
        self.folder, self.device = folder, device
        faces = pictures.find_images([data])
        if not faces:
            raise ValueError(f"expected face pictures in {data}, found none: give a folder with png, jpg or webp files")
        listing = json.dumps([(p.relative_to(data).as_posix(), p.stat().st_size) for p in faces])
        made_of = dict(seed=seed, views=VIEWS, faces=len(faces), sha256=hashlib.sha256(listing.encode()).hexdigest())
        record = folder / "pool.json"
        if not record.is_file():
            make_pool(faces, folder, seed)
            pictures.write_bytes(record, json.dumps(made_of).encode())
        if json.loads(record.read_text()) != made_of:
            raise ValueError(f"expected a pool of {data} and seed {seed} in {folder}, got another one: delete it")
        self.faces = len(faces)

    def restart(self, seed):
        """The order of the pictures begins anew, so that a part is the same whatever was trained before it."""
        self.rng = np.random.default_rng(seed)

    def array(self, name):
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def get(self, name, index):
        """Rows of an array, in the order of index (which is random: parts of a batch are random too)."""
        a = torch.from_numpy(self.array(name)[index].copy()).to(self.device)
        return a.float() / 255 if a.dtype == torch.uint8 else a.float()

    def batch(self, n):
        """n indices, of n different faces (all of them, if there are fewer)."""
        faces = self.rng.permutation(self.faces)[:n]
        return faces * VIEWS + self.rng.integers(VIEWS, size=len(faces))

    def forget(self, name):
        (self.folder / f"{name}.npy").unlink(missing_ok=True)

    @torch.no_grad()
    def derive(self, name, source, function):
        """Writes function(source pictures) as float16 under the name, over the whole pool; `forget` makes it new."""
        path, n = self.folder / f"{name}.npy", self.faces * VIEWS
        if path.is_file():
            return
        parts = [function(self.get(source, np.arange(i, min(i + 64, n)))).half().cpu().numpy()
                 for i in tqdm(range(0, n, 64), desc=f"pool: {name}")]  # fmt: skip
        np.save(path, np.concatenate(parts))
