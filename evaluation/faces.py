"""The faces that evaluate.py measures: clean ones, degraded here, or given pairs of degraded and original (paper Sec. 4).

Usage: for face in degraded(find_faces("faces/val")[0], 128): measure(method(face), face.x)
       for face in given(find_pairs("CelebA-Test/lq", ["CelebA-Test/hq"])[0], "CelebA-Test/hq"): ...
"""

import collections
from pathlib import Path

import numpy as np
from tqdm import tqdm

import degrade
from plumbing import pictures
from plumbing.commands import complain

# name: the path in its folder; seed: of the degradation and the teacher's noise; x: the original, None if there is none;
# y: the degraded face; pictures are (3, H, W) float32 in [0, 1]; files: {folder: path} of given pictures
Face = collections.namedtuple("Face", "name seed x y files", defaults=({},))


# --- clean faces, degraded here ---------------------------------------------------------------------------------------


def find_faces(data, limit=None):
    """[(index, name, path), ...] of the first `limit` pictures of a folder, and the number of those that cannot be read.

    These are named on stderr. The index counts them too, so that the degradations of the other faces stay as they were.
    ValueError if no picture is left.
    """
    found = pictures.find_images([data])[:limit]
    good = [(i, relative(path, data), path) for i, path in enumerate(found) if readable(path)]
    if not good:
        got = f"{len(found)} that cannot be read" if found else "no picture"
        raise ValueError(f"expected clean faces in {data}, got {got}: name another folder")
    return good, len(found) - len(good)


def degraded(found, size, level="default", ranges="difface", seed=0):
    """Yields a Face of `size` px with seed + index for each one found.

    found: from find_faces; level: "default" (drawn from `ranges`) or a name in degrade.LEVELS.
    """
    for i, name, path in tqdm(found, desc=level, disable=None):
        x = pictures.square(pictures.read_image(path), size)
        params = degrade.level(level, size, seed + i) if level != "default" else None
        params = params or degrade.sample(np.random.default_rng((seed, i, degrade.EVALUATION)), ranges, size)
        x = degrade.to_gray(x) if params.gray else x  # as in training: a gray copy has a gray target
        yield Face(name, seed + i, x, degrade.apply(x, params))


# --- given pictures ---------------------------------------------------------------------------------------------------


def find_pairs(lq, others, limit=None):
    """[(index, name, {folder: path}), ...] of the first `limit` pictures in `lq` and their partners, and how many have none.

    others: the folders that must hold a partner: a picture of the same path in its folder, whatever its suffix. What
    restore.py wrote counts too (*_restored; *_compare is passed over). What has no partner, or cannot be read, is named on
    stderr. ValueError if no face is left, or two pictures of a folder differ in the suffix alone.
    """
    folders, good, failed = {folder: by_name(folder) for folder in (lq, *others)}, [], 0
    names = list(folders[lq])[:limit]
    strangers = [] if limit else [name for other in others for name in folders[other] if name not in folders[lq]]
    for i, name in enumerate(dict.fromkeys([*names, *strangers])):
        if missing := [str(folder) for folder, files in folders.items() if name not in files]:
            failed += complain(f"expected a picture {name} in each folder, got none in {', '.join(missing)}: left out")
        elif all([readable(files[name]) for files in folders.values()]):
            good.append(
                (i, relative(folders[lq][name], lq), {folder: files[name] for folder, files in folders.items()})
            )
        else:
            failed += 1
    if not good:
        raise ValueError(
            f"expected pictures of the same names in {' and '.join(map(str, folders))}, got none: see above"
        )
    return good, failed


def by_name(folder):
    """{path in the folder without suffix: path} of its pictures."""
    files = {}
    for path in pictures.find_images([folder]):
        name = str(Path(relative(path, folder)).with_suffix("")).removesuffix("_restored")
        if name.endswith("_compare"):
            continue
        if name in files:
            raise ValueError(f"expected one picture {name} in {folder}, got {files[name]} and {path}: remove one")
        files[name] = path
    return files


def given(pairs, lq, hq=None, seed=0):
    """Yields a Face with seed + index, at the size of its files, for each of find_pairs."""
    for i, name, files in tqdm(pairs, desc=str(lq), disable=None):
        x = pictures.read_image(files[hq]) if hq else None
        yield Face(name, seed + i, x, pictures.read_image(files[lq]), files)


# --- both -------------------------------------------------------------------------------------------------------------


def readable(path):
    """Whether a picture can be read; if not, it is named on stderr."""
    try:
        return pictures.read_image(path) is not None
    except (ValueError, OSError) as e:
        complain(e)
        return False


def relative(path, folder):
    """The path of a picture in a folder, with / on every system; of a picture that was named itself its name."""
    return path.relative_to(folder).as_posix() if Path(folder).is_dir() else path.name
