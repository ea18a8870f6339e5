"""Which picture is written where, so that no output is an input, the output of two, or somebody else's file."""

import os
import re
from pathlib import Path

from plumbing.commands import complain
from plumbing.files import NEEDS, READ, SUFFIXES, find_images, same_name
from plumbing.metadata import is_result


def plan(images, out=None, compare=False, overwrite=False):
    """Which picture is restored to where: ([(picture, output), ...], [what is wrong with the others, ...]).

    Leaves earlier results in folders out. No output is an input or the output of another picture. A file that is in the way,
    and that this program did not make, is kept unless `overwrite` is given or `out` names it. compare: *_compare is written
    too. ValueError if out cannot be what it should be: a folder, or a picture file for a single picture.
    """
    pairs, errors = pairs_of(images, out, "_restored.png", lambda found: without_results(found, beside=out is None))
    if out is not None and not out.is_dir() and (out.exists() or out.suffix.lower() in {*READ, *NEEDS, ".gif"}):
        if out.suffix.lower() not in SUFFIXES or len(pairs) + len(errors) != 1:
            need = f"expected a folder, or for one input a picture ({', '.join(SUFFIXES)})"
            raise ValueError(f"{need}, got -o {out}: name a folder or choose another suffix")
        pairs, overwrite = [(path, out) for path, _ in pairs], True  # OUT is a file, and named on purpose
    return without_clashes(pairs, errors, compare, overwrite)


def plan_copies(images, out):
    """As plan, for copies of pictures in a folder: NAME.png, in the tree that a given folder has."""
    return without_clashes(*pairs_of(images, out, ".png"))


def pairs_of(images, out, ending, select=lambda found: found):
    """(picture, output) for each picture given or, as far as `select` keeps it, found in a folder; and what is wrong."""
    pairs, errors = {}, []
    for given in map(Path, images):
        try:
            found = find_images([given])
        except (ValueError, OSError) as e:
            errors.append(str(e))
            continue
        found = select(found) if given.is_dir() else found
        if not found:
            errors.append(f"expected pictures ({', '.join(SUFFIXES)}) in {given}, got none: name another folder")
        for path in found:
            target = path.with_name(path.stem + ending)
            if out is not None:
                target = out / (target.relative_to(given) if given.is_dir() else target.name)
            pairs.setdefault(os.path.realpath(path), (path, target))  # given twice, done once
    return list(pairs.values()), errors


def without_results(paths, beside):
    """The pictures of a folder but for results: those with our mark, and others beside the picture that they are named after.

    beside: the results of this run are written there, too, so that what is in their way is named when that is known.
    """
    sources = {same_name(path.with_suffix("")) for path in paths}
    good = []
    for path in paths:
        stem = re.sub(r"_(restored|compare)\Z", "", path.stem)
        ours = stem != path.stem and is_result(path)
        if stem == path.stem or not (ours or same_name(path.parent / stem) in sources):
            good.append(path)
        elif not (ours or beside):
            complain(f"{path} is named like a result: not restored")
    return good


def without_clashes(pairs, errors, compare=False, overwrite=True):
    """The pairs whose output is theirs alone; the others are added to the errors."""
    inputs, outputs, good = {same_name(path) for path, _ in pairs}, {}, []
    for path, target in pairs:
        written = [target, compare_name(target)] if compare else [target]
        taken = [t for t in written if same_name(t) in inputs]
        foreign = [t for t in written if t.is_file() and not (overwrite or is_result(t))]
        if taken:
            errors.append(f"expected another output, got {taken[0]} for {path}, itself an input: use -o FOLDER")
        elif same_name(target) in outputs:
            other = outputs[same_name(target)]
            errors.append(f"expected an output for each, got {target} for both {other} and {path}: rename one")
        elif foreign:
            got = f"got {foreign[0]}, which this program did not make"
            errors.append(f"expected a new name for the result of {path}, {got}: kept; use --overwrite or -o FOLDER")
        else:
            outputs[same_name(target)] = path
            good.append((path, target))
    return good, errors


def compare_name(target):
    """Where --compare writes: face_restored.png -> face_compare.png."""
    return target.with_name(target.stem.removesuffix("_restored") + "_compare.png")


def plan_faces(photos, out):
    """As plan_copies, for the faces of photos, without the number and the suffix of their names.

    ValueError if `out` holds a photo, since a second run would take its faces for photos.
    """
    pairs, errors = pairs_of(photos, out, ending="")
    for path, _ in pairs:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise ValueError(f"expected a folder for faces alone, got -o {out}, which holds {path}: name another")
    return without_clashes(pairs, errors)
