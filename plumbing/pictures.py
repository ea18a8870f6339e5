"""Pictures: files to tensors and back.

Pictures are tensors (3, H, W), float32 in [0, 1], sRGB, row 0 at the top. Files are recognised by what is in them, so a
PNG named .jpg is read as the PNG it is. What a file holds beside the colours stays with them in a Picture.
"""

import contextlib
import dataclasses
import io
import logging
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin

from plumbing.colours import SRGB, to_srgb
from plumbing.files import NEEDS, SUFFIXES, read_file, write_bytes
from plumbing.metadata import keep_exif, mark

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP") + (() if ".avif" in NEEDS else ("AVIF",))
WRITERS = {".png": dict(format="PNG"), ".webp": dict(format="WEBP", lossless=True, quality=20, method=1)}
JPEG = dict(format="JPEG", quality=95, subsampling=0)  # and WebP: 5 % above its smallest file, in a third of the time
MAX_PIXELS = 64 * 2**20  # 8192 x 8192; reading one takes about 2 GB
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is higher than ours
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20  # bytes, of an ICC profile too: Pillow's 1 MB is less than a scanner's
warnings.filterwarnings("ignore", module=r"PIL\.")  # on odd EXIF data
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it says of damaged files names none


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture, and what a result should keep of its file."""

    x: torch.Tensor  # (3, H, W) in [0, 1], laid over white
    alpha: torch.Tensor | None = None  # (1, H, W) in [0, 1], 1 is opaque; None if the file has none
    exif: bytes = b""  # see keep_exif


class Refused(ValueError):
    """A picture that is not read, though it may be whole; the message says why."""


# --- reading ----------------------------------------------------------------------------------------------------------


def read_image(path):
    """The picture in a file as (3, H, W) float32 in [0, 1], sRGB.

    The EXIF orientation is applied and an ICC profile converted to sRGB. Gray, palette and CMYK pictures become RGB,
    transparency is laid over white, 16-bit gray keeps its precision, and of an animation the first frame is taken.
    Raises OSError if the file cannot be opened and ValueError, naming the file, if it is none of FORMATS, is truncated or
    damaged, or has more than MAX_PIXELS. HEIC needs the package pillow-heif.
    """
    return read_picture(path).x


def read_picture(path, metadata="basic"):
    """As read_image, but a Picture: with its transparency and what is kept of its EXIF data (metadata: see keep_exif)."""
    return decode_picture(read_file(path), path, metadata)


def decode_picture(data, name, metadata="basic"):
    """As read_picture, of a file's bytes; name stands for the file in messages."""
    try:
        image = _load(data, name)
        return Picture(*_to_tensors(image, name), keep_exif(image, metadata))
    except Refused:
        raise
    except MemoryError:
        raise ValueError(f"expected enough memory for {name}, got too little: make it smaller first") from None
    except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error ... on damaged data
        kinds = f"a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture"
        what = kinds if isinstance(e, Image.UnidentifiedImageError) else "a whole picture"
        raise ValueError(f"expected {what}, got {name}, which cannot be decoded: replace it or leave it out") from e


def _load(data, name):
    """A Pillow image, upright. Where Pillow trips over what stands beside a PNG's pixels, it is read without that."""
    tries = [None]  # which ancillary chunks are kept; None: all that there is
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        tries += [(b"tRNS", b"eXIf", b"iCCP"), (b"tRNS",)]
    for kept in tries:
        try:
            return _decoded(_bare_png(data, kept) if kept else data, name)
        except (Refused, MemoryError):
            raise
        except Exception as e:
            fault = e
    raise fault


def _decoded(data, name):
    formats = FORMATS
    if data[4:8] == b"ftyp" and b"avif" not in data[8:64] and any(b in data[8:64] for b in (b"heic", b"heix", b"mif1")):
        try:
            import pillow_heif
        except ImportError:
            raise Refused(f"expected the package that reads HEIC, got {name}: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
        formats = ("HEIF",)
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Refused(f"expected at most {MAX_PIXELS} pixels, got {width}x{height} in {name}: make it smaller first")
    if image.mode == "F" or (image.mode, image.format) == ("I", "TIFF"):
        raise Refused(f"expected 8 or 16 bits a channel, got 32 in {name}: convert it first")
    image.load()
    with contextlib.suppress(Exception):  # the EXIF data may be damaged where the picture is whole
        ImageOps.exif_transpose(image, in_place=True)  # turns first, and then writes the rest of the data anew
    return image


def _bare_png(data, kept):
    """A PNG without its ancillary chunks, but for those of the kinds `kept` whose checksum is right."""
    chunks, start = [data[:8]], 8
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        chunk = data[start : start + 12 + length]
        right = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or (kind in kept and right):
            chunks.append(chunk)
        start += len(chunk)
    return b"".join(chunks)


def _to_tensors(image, name):
    """x (3, H, W) laid over white, and alpha (1, H, W) or None."""
    if image.mode.startswith("I"):
        return _from_16_bits(image, name)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    mode = image.mode if image.mode in ("CMYK", "LAB") else "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    out = to_srgb(image.convert(mode), image.info.get("icc_profile"), name)
    if alpha is None:
        return _tensor(out), None
    out.putalpha(alpha)
    white = Image.new("RGBA", out.size, "white")
    return _tensor(Image.alpha_composite(white, out).convert("RGB")), _tensor(alpha)


def _from_16_bits(image, name):
    values = np.asarray(image).astype(np.int32)  # "I;16", or "I" in older Pillow
    gray, alpha = values.clip(0, 65535) / 65535, None
    if image.info.get("icc_profile"):  # ImageCms takes 8 bits: the curve through its 256 points
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        curve = np.asarray(to_srgb(ramp, image.info["icc_profile"], name))[0, :, 1]
        gray = np.interp(gray, np.arange(256) / 255, curve / 255)
    if "transparency" in image.info:
        alpha = torch.from_numpy(values != image.info["transparency"]).float()[None]
        gray = np.where(alpha[0].numpy() == 0, 1, gray)
    return torch.from_numpy(gray.astype(np.float32)).expand(3, -1, -1).contiguous(), alpha


def _tensor(image):
    pixels = np.asarray(image).reshape(*image.size[::-1], -1)  # (H, W, C) uint8
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)


# --- shaping ----------------------------------------------------------------------------------------------------------


def is_gray(x):
    """Whether x (3, H, W) has R = G = B in every pixel."""
    return torch.equal(x[0], x[1]) and torch.equal(x[1], x[2])


def to_uint8(x):
    """8-bit values of a picture: 255 x, rounded (halves to even) and clipped to 0 ... 255; any shape, uint8."""
    return (x.detach() * 255).round_().clamp_(0, 255).to(torch.uint8)


def resize(x, size):
    """x (3, h, w) or (B, 3, h, w) in [0, 1] to size (H, W): bicubic, antialiased, clipped. The same size gives x back."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    batch = x if x.ndim == 4 else x[None]
    out = F.interpolate(batch, size=tuple(size), mode="bicubic", align_corners=False, antialias=True).clamp_(0, 1)
    return out if x.ndim == 4 else out[0]


def square(x, size):
    """The middle square of x (3, H, W), resampled to (3, size, size)."""
    s = min(x.shape[1:])
    top, left = ((side - s) // 2 for side in x.shape[1:])
    return resize(x[:, top : top + s, left : left + s], (size, size))


# --- writing ----------------------------------------------------------------------------------------------------------


def encode_image(x, suffix, **info):
    """The bytes of a picture file: PNG and WebP lossless, JPEG quality 95 without chroma subsampling.

    x: (3, H, W) float, clipped to [0, 1], or for PNG and WebP (4, H, W) with alpha; suffix: one of SUFFIXES; info: what else
    Pillow's writer of that format takes. Raises ValueError for another suffix, another shape or values that are not finite.
    """
    suffix = suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"expected one of {', '.join(SUFFIXES)}, got {suffix!r}: choose another file name")
    if x.ndim != 3 or x.shape[0] not in (3, 4):
        raise ValueError(f"expected a picture (3, H, W), got {tuple(x.shape)}: write the pictures one by one")
    if not torch.isfinite(x).all():
        raise ValueError("expected finite values, got a picture with NaN or infinity: check the model that made it")
    image = Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().contiguous().numpy())
    f = io.BytesIO()
    image.save(f, **WRITERS.get(suffix, JPEG), **info)
    return f.getvalue()


def write_image(path, x):
    """Writes x (3, H, W), clipped to [0, 1], by path's suffix, whole or not at all. OSError, or ValueError as encode_image."""
    write_bytes(path, encode_image(x, Path(path).suffix))


def write_result(path, x, like=Picture(None)):
    """As write_image, with what a result carries: our mark, which is_result knows, and the profile that says sRGB.

    like: the Picture that x was made from. Its EXIF data is kept, and by PNG and WebP its alpha too, resized to x: over
    white the colours are those of x.
    """
    suffix = Path(path).suffix.lower()
    if like.alpha is not None and suffix in (".png", ".webp"):
        alpha = resize(like.alpha, x.shape[1:])
        x = torch.cat([torch.where(alpha > 0, 1 - (1 - x) / alpha, x), alpha])
    write_bytes(path, encode_image(x, suffix, icc_profile=SRGB, exif=like.exif, **mark(suffix)))
