"""A cache on disk (paper Fig. 3 left): its shards written, read at random and verified. cache.py says what is in one.

Pictures: (3, H, W) float32 in [0, 1], kept as lossless WebP of 8 bits a channel. Latents: (C, h, w), kept as float16.
"""

import contextlib
import hashlib
import json
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from plumbing.files import write_bytes
from plumbing.pictures import decode_picture

CHECKED = 8  # samples a shard whose latent `check` decodes
MIN_PSNR = 18.0  # dB, decoded target latent against X†; two faces have at most about 16 to each other


class CacheDataset(torch.utils.data.Dataset):
    """A finished cache with random access, for any number of DataLoader workers.

    `.meta`: the dict of meta.json. `[i]`: dict(z_lq, z_target (C, h, w) float32; y, x_target (3, H, W) float32 in [0, 1];
    index int). `.record(i)`: source, its sha256, degradation parameters and teacher seed. ValueError if it is not finished.
    """

    def __init__(self, folder, meta=None):
        self.folder, self.meta, self.files = Path(folder), meta or read_meta(folder), {}
        self.places = [(k, j) for k, shard in enumerate(self.meta["shards"]) for j in range(shard["count"])]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        k, j = self.places[i]
        if k not in self.files:  # opened (mapped into memory) at the first use, by each worker process for itself
            self.files[k] = safe_open(self.folder / self.meta["shards"][k]["file"], "pt")
        f = self.files[k]
        # by numpy, in one thread: torch would start its pool for each small tensor, in every worker
        z = {name: torch.from_numpy(f.get_slice(name)[j].numpy().astype(np.float32)) for name in ("z_lq", "z_target")}
        return dict(**z, y=picture(f, "y", j), x_target=picture(f, "x", j), index=int(i))

    def record(self, i):
        k, j = self.places[i]
        return read_records(self.folder / self.meta["shards"][k]["file"])["samples"][j]

    def __getstate__(self):
        return self.__dict__ | {"files": {}}


def read_meta(folder):
    """meta.json of a finished cache. ValueError if there is none, or if a shard is missing or of another size."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        got = "an unfinished one: run cache.py again" if settings_of(folder) else "none: make one with cache.py"
        raise ValueError(f"expected a finished cache in {folder}, got {got}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = {folder / shard["file"]: shard["bytes"] for shard in meta["shards"]}
        if not meta["preset"] or not meta["image_size"] or meta["count"] != sum(s["count"] for s in meta["shards"]):
            raise ValueError("its count is not the sum of the shards'")
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"expected a cache in {folder}, got a foreign meta.json: make one with cache.py") from None
    for path, size in sizes.items():
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"expected {size} bytes in {path}, got no or another file: delete {folder}, make it again")
    return meta


def picture(f, name, j):
    """Picture j of an open shard, (3, H, W) float32 in [0, 1]; name: "y" or "x"."""
    start, end = f.get_slice(f"{name}_offsets")[j : j + 2].tolist()
    data = f.get_slice(f"{name}_bytes")[start:end].numpy().tobytes()
    return decode_picture(data, f"picture {name} {j} of the cache").x


def read_records(path):
    """The records of a shard's file. ValueError if the file is no shard."""
    try:
        with safe_open(path, "pt") as f:
            return json.loads(f.metadata()["records"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"expected a whole shard, got {path} ({e}): delete it, run cache.py again") from None


def settings_of(folder):
    """The dict of settings.json, or None where there is none. ValueError if it is damaged."""
    path = Path(folder) / "settings.json"
    with contextlib.suppress(ValueError):
        settings = json.loads(path.read_text()) if path.is_file() else None
        if settings is None or isinstance(settings, dict):
            return settings
    raise ValueError(f"expected the settings of a cache in {path}, got no JSON of them: delete {folder}, make it again")


def weights_sha256(module):
    """sha256 of a network's weights and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def write_shard(path, batches):
    """Writes what make_batch returned as one safetensors file, whole or not at all."""
    records = {key: [r for batch in batches for r in batch[key]] for key in ("samples", "skipped")}
    tensors = {}
    for key in ("z_lq", "z_target"):
        none = torch.zeros(0, 0, 0, 0, dtype=torch.float16)
        tensors[key] = torch.cat([batch[key] for batch in batches if key in batch] or [none]).contiguous()
    for key in ("y", "x"):
        blobs = [blob for batch in batches for blob in batch[key]]
        tensors[f"{key}_bytes"] = torch.from_numpy(np.frombuffer(b"".join(blobs), np.uint8).copy())
        tensors[f"{key}_offsets"] = torch.tensor([0, *accumulate(map(len, blobs))])
    write_bytes(path, save(tensors, {"records": json.dumps(records)}))


def check(folder, meta, decode, params):
    """Verifies each shard of a finished cache: sha256, count, shapes, finite latents, sizes, PSNR. Yields a line a fault.

    decode: latents (1, C, h, w) -> (1, 3, S, S) in [0, 1]; params: what reads a record's degradation, an error if it is none.
    """
    for shard in tqdm(meta["shards"], unit=" shards"):
        try:
            for fault in check_shard(Path(folder) / shard["file"], shard, meta["image_size"], decode, params):
                yield f"{shard['file']}: {fault}"
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as e:
            yield f"{shard['file']}: cannot be read: {e}"


def check_shard(path, shard, S, decode, params):
    if hashlib.sha256(path.read_bytes()).hexdigest() != shard["sha256"]:
        yield "expected the sha256 in meta.json, got another: the file was changed"
    f, n = safe_open(path, "pt"), shard["count"]
    z_lq, z_target, samples = f.get_tensor("z_lq"), f.get_tensor("z_target"), read_records(path)["samples"]
    if not len(samples) == len(z_lq) == len(z_target) == n or z_lq.shape != z_target.shape:
        yield f"expected {n} samples, got {len(samples)} with latents {tuple(z_lq.shape)}, {tuple(z_target.shape)}"
        return
    for j in range(n):
        params(**samples[j]["params"])
        y, x = picture(f, "y", j), picture(f, "x", j)
        if not y.shape == x.shape == (3, S, S):
            yield f"sample {j}: expected pictures of {S} px, got {tuple(y.shape)}, {tuple(x.shape)}"
        elif not (torch.isfinite(z_lq[j]).all() and torch.isfinite(z_target[j]).all()):
            yield f"sample {j}: expected finite latents, got NaN or infinity"
        elif j < CHECKED:
            psnr = -10 * torch.log10((decode(z_target[j : j + 1].float())[0] - x).square().mean())
            if not psnr >= MIN_PSNR:
                yield f"sample {j}: expected a latent that decodes to X† at {MIN_PSNR} dB or more, got {psnr:.1f} dB"
