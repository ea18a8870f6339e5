"""Reading and writing pictures safely; nothing else.

Pictures are tensors (3, H, W), float32 in [0, 1], RGB, row 0 at the top. Files are PNG, JPEG or WebP and are recognised
by what is in them, so a PNG named .jpg is read as the PNG it is. Colour profiles are ignored: values are taken as sRGB.

Usage: for path in find_images(["folder", "face.png"]): write_image(out / path.name, read_image(path))
"""

import contextlib
import io
import os
import secrets
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 64 * 2**20  # 8192 x 8192; reading one takes about 2 GB
warnings.filterwarnings("ignore", module=r"PIL\.")  # on odd EXIF data, and its own size limit: ours is in decode_image


def find_images(paths):
    """Picture files: files as given, folders searched recursively and sorted; each file once, in order of appearance.

    paths: one path or several. Returns a list of Path, empty if the folders hold no picture. Hidden files and folders
    (names with a leading dot) inside a folder are passed over. Raises FileNotFoundError for a path that does not exist,
    ValueError for a file with a suffix outside SUFFIXES, PermissionError for a folder that cannot be read.
    """
    found = []
    for path in [Path(paths)] if isinstance(paths, (str, os.PathLike)) else map(Path, paths):
        if path.is_dir():
            found += sorted(_walk(path), key=lambda p: p.as_posix())
        elif not path.exists():
            raise FileNotFoundError(f"expected a picture or a folder, got {path}, which does not exist: check the path")
        elif path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"expected a picture ({', '.join(SUFFIXES)}), got {path}: convert it or leave it out")
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _walk(folder):
    def fail(error):  # os.walk would pass over an unreadable folder in silence
        raise PermissionError(
            f"expected a folder that can be read, got {error.filename} ({error.strerror}): change its rights or leave it out"
        )

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(root, name)


def read_image(path):
    """The picture in a file as (3, H, W) float32 in [0, 1].

    The EXIF orientation is applied, gray and palette pictures become RGB, transparency is laid over white, 16-bit gray
    keeps its precision, and of an animation the first frame is taken. Raises OSError if the file cannot be opened and
    ValueError, naming the file, if it is no PNG, JPEG or WebP, is truncated or damaged, or has more than MAX_PIXELS.
    """
    return decode_image(read_file(path), path)


def read_file(path):
    """The bytes of a file. OSError for what is none: to open a named pipe, say, would be to wait for ever."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError(f"expected a file, got {path}, which is none: leave it out")
        return Path(path).read_bytes()
    except FileNotFoundError as e:
        raise FileNotFoundError(f"expected a picture, got {path}, which does not exist: check the path") from e
    except PermissionError as e:
        raise PermissionError(f"expected a file that can be read, got {path} ({e.strerror}): change its rights") from e


def decode_image(data, name):
    """As read_image, of a file's bytes; name stands for the file in messages."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                image.load()
                return _to_tensor(ImageOps.exif_transpose(image))
    except MemoryError:
        raise ValueError(f"expected enough memory for {name}, got too little: make it smaller first") from None
    except Image.DecompressionBombError:
        width = height = None
    except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error ... on damaged data
        what = "a PNG, JPEG or WebP picture" if isinstance(e, Image.UnidentifiedImageError) else "a whole picture"
        raise ValueError(f"expected {what}, got {name}, which cannot be decoded: replace it or leave it out") from e
    size = f"{width}x{height}" if width else "far more"
    raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {size} in {name}: make it smaller first")


def _to_tensor(image):
    if image.mode.startswith("I"):  # 16-bit gray: "I;16", or "I" in older Pillow
        gray = np.asarray(image).astype(np.float32) / 65535
        return torch.from_numpy(gray.clip(0, 1)).expand(3, -1, -1).contiguous()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("RGB"))  # (H, W, 3) uint8
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def to_uint8(x):
    """8-bit values of a picture: 255 x, rounded (halves to even) and clipped to 0 ... 255; any shape, uint8."""
    return (x.detach() * 255).round().clamp(0, 255).to(torch.uint8)


def resize(x, size):
    """Bicubic resampling with antialiasing to size = (H, W).

    x: (3, h, w) or (B, 3, h, w) float32 in [0, 1]; the result is clipped to [0, 1]. The same size gives x back.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    batch = x if x.ndim == 4 else x[None]
    out = F.interpolate(batch, size=tuple(size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return out if x.ndim == 4 else out[0]


def square(x, size):
    """The middle square of x (3, H, W), resampled to (3, size, size)."""
    _, H, W = x.shape
    s = min(H, W)
    top, left = (H - s) // 2, (W - s) // 2
    return resize(x[:, top : top + s, left : left + s], (size, size))


def encode_image(x, suffix):
    """The bytes of a picture file: PNG and WebP lossless, JPEG quality 95 without chroma subsampling.

    x: (3, H, W) float, clipped to [0, 1]; suffix: one of SUFFIXES. Raises ValueError for another suffix, another shape
    or values that are not finite.
    """
    suffix = suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"expected one of {', '.join(SUFFIXES)}, got {suffix!r}: choose another file name")
    if x.ndim != 3 or x.shape[0] != 3:
        raise ValueError(f"expected a picture (3, H, W), got {tuple(x.shape)}: write the pictures one by one")
    if not torch.isfinite(x).all():
        raise ValueError("expected finite values, got a picture with NaN or infinity: check the model that made it")
    image = Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().contiguous().numpy())
    f = io.BytesIO()
    if suffix == ".png":
        image.save(f, "PNG")
    elif suffix == ".webp":
        image.save(f, "WEBP", lossless=True, quality=20, method=1)  # 5 % above the smallest, in a third of its time
    else:
        image.save(f, "JPEG", quality=95, subsampling=0)
    return f.getvalue()


def write_image(path, x):
    """Writes x (3, H, W), clipped to [0, 1], as PNG, JPEG or WebP by the suffix of path; whole or not at all.

    Raises ValueError as encode_image does, OSError if the file cannot be written.
    """
    write_bytes(path, encode_image(x, Path(path).suffix))


def write_bytes(path, data):
    """Writes a file whole or not at all: temporary name beside it, flush, fsync, rename. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync(path.parent)  # else a power cut could undo the rename
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError):  # the temporary name would tell nothing
            got = f"got {e.strerror or e}"
            raise type(e)(f"expected to write {path}, {got}: make room, or choose another place or name") from e
        raise


def make_folder(path):
    """Makes a folder, and those above it, and returns its Path. OSError if it cannot be made or written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        got = "a file of that name" if isinstance(e, FileExistsError) else e.strerror
        raise type(e)(f"expected a folder to write to at {path}, got {got}: name another") from e
    if not os.access(path, os.W_OK):
        raise PermissionError(f"expected a folder to write to, got {path}, which is read-only: name another")
    return Path(path)


def sync(path):
    """Flushes a written file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
