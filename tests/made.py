"""Pictures made for the tests: pixels, files, EXIF data and ICC profiles (by the tables of ICC.1:2001-04)."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageCms


def noise(h=9, w=13, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def tensor(pixels):
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def chunk(kind, data):
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def file_of(image, kind="PNG", **info):
    """The bytes of a picture file as Pillow writes it."""
    f = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(f, kind, **info)
    return f.getvalue()


def exif(*entries):
    """EXIF data with the directory entries (tag, type, count, data), laid out by TIFF 6.0."""
    directory, rest, at = struct.pack("<H", len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, data in entries:
        value = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", at + len(rest))
        directory, rest = directory + struct.pack("<HHI", tag, kind, count) + value, rest + data * (len(data) > 4)
    return b"Exif\0\0II*\0\x08\0\0\0" + directory + bytes(4) + rest


SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))  # XYZ of R, G, B, D50
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def rgb_profile(primaries):
    """An RGB profile with sRGB's curve; primaries: XYZ of red, green and blue under D50."""
    curve = b"para" + struct.pack(">IHH5i", 0, 3, 0, *map(_fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    colours = {name: _xyz(v) for name, v in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    return _profile(b"RGB ", b"XYZ ", colours | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def gray_profile():
    """A gray profile with gamma 1."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": b"curv" + struct.pack(">IIH", 0, 1, 256)})


def cmyk_profile(paints):
    """A CMYK profile; paints: a function of four zeros or ones to the sRGB colour of that ink, between which it is linear."""
    inks = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    colours = Image.fromarray(np.array([[paints(*ink) for ink in inks]], np.uint8))
    lab = np.asarray(ImageCms.profileToProfile(colours, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
                                               outputMode="LAB"))  # fmt: skip
    grid = (lab[0] ^ np.array([0, 128, 128], np.uint8)).tobytes()  # a and b from 0 on, not signed
    lut = b"mft1" + struct.pack(">I4B9i", 0, 4, 3, 2, 0, *map(_fixed, np.eye(3).flat))
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut + bytes(range(256)) * 4 + grid + bytes(range(256)) * 3})


def _profile(space, connection, tags):
    tags = {b"wtpt": _xyz((0.9642, 1, 0.8249))} | tags
    at, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += struct.pack(">4s2I", name, at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s12x4s28x3i", at + len(body), b"test", 0x02400000, kind, space, connection, b"acsp",
                         *map(_fixed, (0.9642, 1, 0.8249)))  # fmt: skip
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _fixed(number):
    return round(number * 65536)


def _xyz(values):
    return b"XYZ " + struct.pack(">I3i", 0, *map(_fixed, values))
