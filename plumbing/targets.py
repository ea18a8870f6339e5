"""Which picture is written where, so that no output is an input, or the output of two."""

from pathlib import Path

from plumbing.pictures import SUFFIXES, find_images


def plan(images, out=None):
    """Which picture is written where: ([(picture, output), ...], [what is wrong with the others, ...]).

    Skips earlier results (*_restored, *_compare) in folders. No output is an input or the output of another picture.
    ValueError if out cannot be what it should be: a folder, or a picture file for a single picture.
    """
    pairs, errors = {}, []
    for given in map(Path, images):
        try:
            found = [
                p for p in find_images([given]) if not (given.is_dir() and p.stem.endswith(("_restored", "_compare")))
            ]
        except (ValueError, OSError) as e:
            errors.append(str(e))
            continue
        if not found:
            errors.append(f"expected pictures ({', '.join(SUFFIXES)}) in {given}, got none: name another folder")
        for path in found:
            target = path.with_name(f"{path.stem}_restored.png")
            if out is not None:
                target = out / (target.relative_to(given) if given.is_dir() else target.name)
            pairs.setdefault(path.resolve(), (path, target))  # given twice, done once
    pairs = list(pairs.values())
    if (
        out is not None
        and not out.is_dir()
        and out.suffix.lower() in (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
    ):
        raise ValueError(
            f"expected a folder, or a picture ({', '.join(SUFFIXES)}), got -o {out}: choose another suffix"
        )
    if out is not None and not out.is_dir() and (out.suffix.lower() in SUFFIXES or out.exists()):
        if out.suffix.lower() not in SUFFIXES or len(pairs) + len(errors) != 1:
            raise ValueError(f"expected a folder, or for one input a picture's name, got -o {out}: name a folder")
        pairs = [(path, out) for path, _ in pairs]
    return without_clashes(pairs, errors)


def without_clashes(pairs, errors):
    """The pairs whose output is theirs alone; the others are added to the errors."""
    inputs, outputs, good = {path.resolve() for path, _ in pairs}, {}, []
    for path, target in pairs:
        taken = [t for t in (target, compare_name(target)) if t.resolve() in inputs]
        if taken:
            errors.append(
                f"expected an output beside the inputs, got {taken[0]} for {path}, itself an input: use -o FOLDER"
            )
        elif target.resolve() in outputs:
            other = outputs[target.resolve()]
            errors.append(f"expected an output for each, got {target} for both {other} and {path}: rename one")
        else:
            outputs[target.resolve()] = path
            good.append((path, target))
    return good, errors


def compare_name(target):
    """Where --compare writes: face_restored.png -> face_compare.png."""
    return target.with_name(target.stem.removesuffix("_restored") + "_compare.png")
