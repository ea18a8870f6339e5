"""Finding pictures in folders, and writing files whole or not at all."""

import contextlib
import csv
import errno
import importlib.util
import io
import os
import secrets
import unicodedata
from collections import Counter
from pathlib import Path

from PIL import features

from plumbing.commands import complain

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")  # what is written, and read
HEIF = (".heic", ".heif", ".hif")
NEEDS = {} if "avif" in features.get_supported_modules() else {".avif": "for .avif install a Pillow that has AVIF"}
if not importlib.util.find_spec("pillow_heif"):
    NEEDS |= dict.fromkeys(HEIF, "for .heic and .heif: pip install pillow-heif")
READ = SUFFIXES + tuple(s for s in (".tif", ".tiff", ".bmp", ".avif", *HEIF) if s not in NEEDS)  # what is read


# --- finding ----------------------------------------------------------------------------------------------------------


def find_images(paths):
    """Picture files: files as given, folders searched recursively and sorted; each file once, in order of appearance.

    paths: one path or several. Returns a list of Path. In a folder, names with a leading dot are passed over, links to
    folders are followed, each folder once, and one line on stderr counts the other files by kind. FileNotFoundError for a
    path that does not exist, ValueError for a suffix outside READ, PermissionError for a folder that cannot be read.
    """
    found = {}
    for path in [Path(paths)] if isinstance(paths, (str, os.PathLike)) else map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"expected a picture or a folder, got {path}, which does not exist: check the path")
        if not path.is_dir() and path.suffix.lower() not in READ:
            remedy = NEEDS.get(path.suffix.lower(), "convert it or leave it out")
            raise ValueError(f"expected a picture ({', '.join(READ)}), got {path}: {remedy}")
        for picture in _search(path) if path.is_dir() else [path]:
            found.setdefault(os.path.realpath(picture), picture)
    return list(found.values())


def _search(folder):
    """The pictures in a folder and, after all that lies in it, in the folders that its links lead to."""
    pictures, others, seen, tops = [], Counter(), set(), [str(folder)]
    for top in tops:
        for root, folders, names in os.walk(top, onerror=_unreadable):
            home = os.path.realpath(root)
            folders[:] = [] if home in seen else sorted(name for name in folders if not name.startswith("."))
            names = [] if home in seen else [Path(root, name) for name in names if not name.startswith(".")]
            seen.add(home)
            for link in filter(os.path.islink, [os.path.join(root, name) for name in folders]):  # os.walk passes them
                if Path(home).is_relative_to(os.path.realpath(link)):
                    _note(f"{link} leads back to a folder that holds it: not followed")
                else:
                    tops.append(link)
            pictures += [path for path in names if path.suffix.lower() in READ]
            others.update(path.suffix.lower() or "without suffix" for path in names if path.suffix.lower() not in READ)
    if others:
        kinds = [f"{others[kind]} {kind}" for kind in sorted(others, key=lambda kind: (-others[kind], kind))]
        remedies = sorted({NEEDS[kind] for kind in others if kind in NEEDS})
        _note("; ".join([f"{folder}: left out {others.total()} other files ({', '.join(kinds)})", *remedies]))
    return sorted(pictures, key=Path.as_posix)


def _note(text):
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first one speaks
        complain(text)


def _unreadable(error):  # os.walk would pass over an unreadable folder in silence
    raise PermissionError(f"expected a folder that can be read, got {error.filename} ({error.strerror}): leave it out")


def same_name(path):
    """A key that is equal for names of one file, on any system: links resolved, letters folded as macOS and Windows do."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


# --- reading and writing ----------------------------------------------------------------------------------------------


def read_file(path):
    """The bytes of a file. OSError for what is none: to open a named pipe, say, would be to wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"expected a file, got {path}, which is none: leave it out")
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as e:
        raise FileNotFoundError(f"expected a file, got {path}, which does not exist: check the path") from e
    except OSError as e:
        raise type(e)(f"expected a file that can be read, got {path} ({e.strerror}): check it or leave it out") from e


def write_bytes(path, data):
    """Writes a file whole or not at all: temporary name beside it, flush, fsync, rename. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short: the name itself may be as long as names can be
    try:
        with open(temporary, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync(path.parent)  # else a power cut could undo the rename
    except OSError as e:  # the temporary name would tell nothing
        raise type(e)(f"expected to write {path}, got {e.strerror or e}: make room, or choose another name") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_csv(path, needed):
    """The rows of a CSV file, dicts. ValueError if it has none, or lacks a column of `needed`; OSError as read_file."""
    text = read_file(path).decode("utf-8-sig", "surrogateescape")
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as e:
        raise ValueError(f"expected a CSV file, got {path} ({e}): write it anew") from e
    if missing := [name for name in needed if not rows or name not in rows[0]]:
        raise ValueError(f"expected rows with {', '.join(needed)} in {path}, got no {', '.join(missing)}: add it")
    return rows


def write_csv(path, rows):
    """Writes a CSV file, whole or not at all. rows: dicts with one set of keys, which name the columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode(errors="surrogateescape"))  # a file name need not be valid UTF-8


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
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as e:  # Windows opens no folder; VirtualBox's shares, CIFS and some FUSE mounts flush none
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES) or not os.path.isdir(path):
            raise
