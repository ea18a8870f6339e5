"""The faces that evaluate.py measures: clean ones, degraded here, or given pairs of degraded and original (paper Sec. 4)."""

import collections
from pathlib import Path

import numpy as np
from tqdm import tqdm

import degrade
from plumbing import pictures
from plumbing.commands import complain
from plumbing.files import find_images
from plumbing.targets import without_results

# name: the path in its folder; seed: of the degradation and the teacher's noise; x: the original, None if there is none;
# y: the degraded face; restored: files of other programs' results. Pictures are (3, H, W) float32 in [0, 1].
Face = collections.namedtuple("Face", "name seed x y restored", defaults=((),))


# --- finding ----------------------------------------------------------------------------------------------------------


def find_faces(folder, hq=None, restored=(), limit=None):
    """[(index, name, paths), ...] of the first `limit` faces in a folder, and the number of those left out.

    paths: of the same name, whatever the suffix, in it, in the folder of originals hq if there is one, and in each folder of
    `restored`, where what restore.py writes counts too: *_restored. A face that lacks a partner, or cannot be read, is named
    on stderr; the index counts it too, so that the others' degradations stay. ValueError if none is left, or two pictures of
    a folder have one name.
    """
    folders = [folder, *([hq] if hq else []), *restored]
    files = [by_name(folder, results=k >= len(folders) - len(restored)) for k, folder in enumerate(folders)]
    names = list(files[0])[:limit] if limit else dict.fromkeys(name for own in files for name in own)
    good = []
    for i, name in enumerate(names):
        paths = [own.get(name) for own in files]
        if None in paths:
            lacking = ", ".join(str(folder) for folder, path in zip(folders, paths, strict=True) if path is None)
            complain(f"expected a picture {name} in each folder, got none in {lacking}: left out")
        elif all([readable(path) for path in paths]):
            good.append((i, relative(paths[0], folder), paths))
    if not good:
        where = " and, by the same names, ".join(map(str, folders))
        raise ValueError(f"expected faces that can be read in {where}, got none: name another folder")
    return good, len(names) - len(good)


def by_name(folder, results):
    """{path in the folder without suffix: path} of its pictures: of the results in it, or of the others."""
    found, files, restored = find_images([folder]), {}, {}
    for path in found if results else without_results(found, beside=True):
        name = relative(path.with_suffix(""), folder)
        if results and name.endswith("_restored"):
            restored[name.removesuffix("_restored")] = path
        elif name in files:
            raise ValueError(f"expected one picture {name} in {folder}, got {files[name]} and {path}: remove one")
        elif not (results and name.endswith("_compare")):
            files[name] = path
    return files | restored  # a result rather than the input beside it


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


# --- clean faces, degraded here, or given pictures --------------------------------------------------------------------


def degraded(found, size, level="default", ranges="difface", seed=0):
    """Yields a Face of `size` px with seed + index for each one found.

    found: from find_faces; level: "default" (drawn from `ranges`) or a name in degrade.LEVELS.
    """
    for i, name, (path,) in tqdm(found, desc=level, disable=None):
        x = pictures.square(pictures.read_image(path), size)
        rng = np.random.default_rng((seed, i, degrade.EVALUATION))
        params = degrade.sample(rng, ranges, size) if level == "default" else degrade.level(level, size, seed + i)
        x = degrade.to_gray(x) if params.gray else x  # a gray copy has a gray original
        yield Face(name, seed + i, x, degrade.apply(x, params))


def given(found, lq, hq=None, seed=0):
    """Yields a Face with seed + index, at the size of its files, for each one found."""
    for i, name, paths in tqdm(found, desc=str(lq), disable=None):
        first, *others = paths
        x = pictures.read_image(others.pop(0)) if hq else None
        yield Face(name, seed + i, x, pictures.read_image(first), others)
