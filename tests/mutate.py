"""Pictures that go wrong in every way: valid ones of each format that Pillow writes, mutated by a seed.

python tests/mutate.py FOLDER [N]        writes N (300) files; those named harmless-* show the same picture as before
"""

import contextlib
import sys
import warnings
from pathlib import Path

import numpy as np
from made import file_of
from PIL import Image, PngImagePlugin

READ = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".bmp": "BMP", ".avif": "AVIF"}
CARRIERS = {".png": ("exif", "icc", "text"), ".jpg": ("exif", "icc"), ".webp": ("exif", "icc"), ".tif": ("icc",)}


def picture():
    """The picture that is mutated, 48 x 40: smooth, so that JPEG keeps it."""
    y, x = np.mgrid[:40, :48]
    return Image.fromarray(np.stack([5 * x, 6 * y, 3 * x + 2 * y], 2).astype(np.uint8))


def formats():
    """Pillow's writers of this machine that take a colour picture: {suffix: bytes of the picture}."""
    Image.init()
    suffixes = {name: suffix for suffix, name in sorted(Image.registered_extensions().items())}
    valid = {}
    for name, suffix in (suffixes | {name: suffix for suffix, name in READ.items()}).items():
        with contextlib.suppress(Exception):  # a format that is only read, or takes no colours
            valid[suffix] = file_of(picture(), name)
    return valid


def flip(data, rng, low, high):
    data = bytearray(data)
    for i in rng.integers(low, max(low + 1, min(high, len(data))), rng.integers(1, 9)):
        data[i % len(data)] ^= int(rng.integers(1, 256))
    return bytes(data)


def carry(suffix, rng):
    """The picture with EXIF data, an ICC profile or text of random bytes."""
    what, junk = rng.choice(CARRIERS[suffix]), rng.bytes(int(rng.integers(1, 3000)))
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", junk.decode("latin-1") * 1000, zip=True)
    info = {"exif": {"exif": b"Exif\0\0" + (b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08")[len(junk) % 2] + junk},
            "icc": {"icc_profile": junk}, "text": {"pnginfo": text}}[what]  # fmt: skip
    return file_of(picture(), READ[suffix], **info)


def mutated(n=300, seed=0):
    """Yields n (name, bytes). The same seed gives the same files, with one version of Pillow."""
    rng, valid = np.random.default_rng(seed), formats()
    suffixes = sorted(valid)
    for i in range(n):
        suffix = suffixes[int(rng.integers(len(suffixes)))] if i % 3 == 0 else list(READ)[int(rng.integers(len(READ)))]
        suffix = suffix if suffix in valid else ".png"
        data = valid[suffix]
        way = ("cut", "header", "data", "harmless-suffix", "harmless-extra")[i % 5]
        if way == "cut":
            data = data[: int(rng.integers(len(data)))]
        elif way == "header":
            data = flip(data, rng, 0, 64)
        elif way == "data":
            data = flip(data, rng, 64, len(data))
        elif way == "harmless-suffix":
            way, suffix = (way if suffix in READ else "foreign"), str(rng.choice(list(READ)))
        else:
            suffix = str(rng.choice(list(CARRIERS)))
            data = carry(suffix, rng)
        yield f"{way}-{i:03d}{suffix}", data


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    for name, data in mutated(int(sys.argv[2]) if len(sys.argv) > 2 else 300):
        (folder / name).write_bytes(data)
