"""Five landmarks a face, found by a detector or read from a CSV file; nothing else.

Landmarks are (5, 2) float64: x, y of the left eye, the right eye, the nose, the left and the right corner of the mouth,
left and right as in the picture. They are in the photo's pixels, counted from its top left corner: the middle of its
first pixel is (0.5, 0.5). Spread says how far several readings of one face lie apart, in distances of its eyes.
The detector is MTCNN (Zhang et al. 2016) with the weights in the optional facenet-pytorch.

Usage: for points, spread in find_landmarks(read_image("photo.jpg")): ...
"""

import contextlib
import functools

import numpy as np
import torch

from plumbing.commands import optional
from plumbing.files import read_csv
from plumbing.pictures import resize, to_uint8

LONG_SIDE = 1280  # px, to which a photo is reduced; so a face's cost does not depend on the camera
SCALES = (1, 0.75)  # of that, the two sizes at which it is read
SMALLEST = 20  # px, the detector's box of the smallest face at those sizes
MIRRORED = [1, 0, 2, 4, 3]  # what each one is in a mirror
COLUMNS = [f"{name}_{axis}" for name in ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth") for axis in "xy"]


def face_finder(path=None):
    """A function (path, photo) -> list of (points, spread), the largest face first.

    Of a CSV file at `path` it gives a photo's faces under its path, or else under its file name; without one it looks for
    faces. Raises what read_landmarks or load_detector raises.
    """
    if path is None:
        load_detector()
        return lambda _, photo: find_landmarks(photo)
    table = read_landmarks(path)

    def from_table(photo_path, photo):
        faces = table.get(str(photo_path), table.get(photo_path.name, []))
        for points, _ in faces:
            check_size(points, photo, f"{photo_path} in {path}")
        return faces

    return from_table


def check_size(points, photo, where):
    """ValueError unless the photo (3, H, W) can show a face with such landmarks, (5, 2), perhaps cut off by its border."""
    (H, W), L = photo.shape[1:], max(photo.shape[1:])
    outside = torch.maximum(-points, points - torch.tensor([W, H])).max()
    if outside > 0.1 * L or (points.amax(0) - points.amin(0)).max() > 0.6 * L:
        raise ValueError(f"expected landmarks in {W} x {H} px, got some at {points[2].tolist()} of {where}: scale them")


def find_landmarks(photo, long_side=LONG_SIDE, scales=SCALES):
    """The faces of a photo (3, H, W), float32 in [0, 1]: a list of (points, spread), the largest face first.

    Each size is read plain and mirrored. A face is what at least half of the readings see; its points are their median,
    its spread is the largest distance of a reading's point from them. ValueError if facenet-pytorch is not installed.
    """
    long_side = min(long_side, max(photo.shape[1:]))
    readings = [points for scale in scales for points in _read(photo, scale * long_side)]
    faces = [_median(same) for same in _groups(readings) if len(same) >= len(scales)]
    return sorted(faces, key=lambda face: -eye_distance(face[0]))


def eye_distance(points):
    """Distance of the eyes of points (5, 2), in pixels."""
    return float((points[1] - points[0]).norm())


def _read(photo, long_side):
    """What the detector sees in the photo, at one size, and in its mirror image: list of (5, 2) in the photo's pixels."""
    H, W = photo.shape[1:]
    h, w = round(long_side * H / max(H, W)), round(long_side * W / max(H, W))
    if min(h, w) < SMALLEST:
        return []
    small = resize(photo, (h, w))
    to_photo = torch.tensor([W / w, H / h])
    plain, mirrored = _detect(small), _detect(small.flip(-1))
    mirrored = [torch.stack([w - points[:, 0], points[:, 1]], 1)[MIRRORED] for points in mirrored]
    return [points * to_photo for points in plain + mirrored]


def _detect(x):
    pixels = to_uint8(x).permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
    _, _, found = load_detector().detect(pixels, landmarks=True)
    return [] if found is None else list(torch.from_numpy(np.asarray(found, dtype=np.float64)))


@functools.cache
def load_detector():
    """MTCNN of facenet-pytorch; ValueError if that is not installed."""
    # without its dependencies, which would bring back old versions of torch and numpy
    package = optional("facenet_pytorch", "finding faces", install="--no-deps facenet-pytorch==2.6.0")
    return package.MTCNN(min_face_size=SMALLEST, keep_all=True)


def _groups(readings):
    """Readings of one face: those whose noses lie within a distance of the eyes from each other's."""
    left = sorted(readings, key=lambda points: -eye_distance(points))
    while left:
        near = [float((points[2] - left[0][2]).norm()) < eye_distance(left[0]) for points in left]
        yield [points for points, same in zip(left, near, strict=True) if same]
        left = [points for points, same in zip(left, near, strict=True) if not same]


def _median(same):
    same = torch.stack(same)  # (readings, 5, 2)
    points = same.quantile(0.5, dim=0)  # of an even number the middle of the middle two, as torch.median is not
    points = points.round(decimals=2)  # as in a file, so that landmarks from a file give the same pixels
    return points, float((same - points).norm(dim=-1).max()) / eye_distance(points)


def read_landmarks(path):
    """The faces in a CSV file: {photo: [(points, 0.0), ...]}, the largest face first.

    Its first row names the columns: `photo`, a photo's path or file name, and COLUMNS, in any order among others, so that
    align.py's manifest.csv is such a file. OSError if there is no such file, ValueError if it says something else.
    """
    faces = {}
    for line, row in enumerate(read_csv(path, ("photo", *COLUMNS)), start=2):
        faces.setdefault(row["photo"], []).append((_row_points(row, f"{path}, line {line}"), 0.0))
    return {photo: sorted(found, key=lambda face: -eye_distance(face[0])) for photo, found in faces.items()}


def _row_points(row, where):
    with contextlib.suppress(TypeError, ValueError):
        points = torch.tensor([float(row[name]) for name in COLUMNS], dtype=torch.float64).view(5, 2)
        if points.isfinite().all() and eye_distance(points) > 0:
            return points
    raise ValueError(f"expected ten finite numbers, the two eyes apart, got others in {where}: mend it")
