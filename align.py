"""A photo -> the square of FFHQ around each face -> and, when that is restored, back into the photo.

    e = right eye - left eye       m = middle of the mouth - middle of the eyes       rot90(v) = (-v_y, v_x), a quarter turn
    x = e - rot90(m), of length max(2.0 |e|, 1.8 |m|)         y = rot90(x)            c = middle of the eyes + 0.1 m
    p(a, b) = c + a x + b y                                   the points of the square, a, b in [-1, 1]; its side is 2 |x|
    crop(a, b) = photo(p)                                     photo(p) += mask(a, b) (restored - crop)(a, b)

So FFHQ was cut (Karras et al. 2019), and so the faces lie that networks were trained on. Photos and crops are (3, H, W)
float32 in [0, 1]. Points are x, y in the photo's pixels from its top left corner, y downwards. A square is (2, 2): c, x.

Usage: python align.py PHOTOS -o FACES                    FACES/photo_0.png ... and FACES/manifest.csv
       python align.py PHOTOS -o FACES --landmarks CSV    five points a face from a file: another detector's, a manifest
"""

import argparse
import math
import sys
from pathlib import Path

from plumbing import commands


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Cut faces out of photos as FFHQ was cut: photo.jpg -> photo_0.png ...")
    p.add_argument("photos", nargs="+", metavar="PHOTO_OR_FOLDER", help="photos, or folders searched recursively")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="FACES", help="folder for faces and manifest.csv")
    p.add_argument("--size", type=commands.whole(16, 2048), default=512, help="side of a face, pixels (default 512)")
    p.add_argument("--landmarks", type=Path, metavar="CSV", help="the faces' landmarks, do not look for faces")
    return p.parse_args(argv)


if __name__ == "__main__":
    ARGS = commands.begin(parse_args, "the faces that are written are whole, but stand in no manifest")

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from plumbing.files import make_folder, write_csv
from plumbing.landmarks import COLUMNS, face_finder, find_landmarks
from plumbing.pictures import read_image, resize, write_image
from plumbing.targets import plan_faces

UNSTEADY = 0.25  # spread of landmarks that are not to be trusted, as of a profile
TOO_SMALL = 48  # px, side of a square whose face a network would have to invent

# --- the square of a face -------------------------------------------------------------------------------------------------


def rot90(v):
    """v (..., 2) turned by a quarter, from x to y."""
    return torch.stack([-v[..., 1], v[..., 0]], -1)


def square(points):
    """FFHQ's square around a face: landmarks (5, 2), see plumbing/landmarks.py -> (2, 2), its c and its x."""
    left_eye, right_eye, _, left_mouth, right_mouth = points
    e = right_eye - left_eye
    m = (left_mouth + right_mouth - left_eye - right_eye) / 2
    x = e - rot90(m)
    x = x / x.norm() * max(2.0 * e.norm(), 1.8 * m.norm())
    return torch.stack([(left_eye + right_eye) / 2 + 0.1 * m, x])


def side(square):
    """The side of a square (2, 2), pixels of the photo."""
    return 2 * float(square[1].norm())


def box(square):
    """The upright box around a square (2, 2): left, top, right, bottom (4,), which may lie outside the photo."""
    c, x = square
    reach = x.abs() + rot90(x).abs()
    return torch.cat([c - reach, c + reach])


# --- photo -> face --------------------------------------------------------------------------------------------------------


def crop(photo, square, size):
    """The face in a square (2, 2) of a photo (3, H, W): (3, size, size). What lies outside the photo is mirrored and softened.

    Bicubic, turned like the square, no coarser than the photo and at a multiple of size; then reduced with antialiasing.
    """
    H, W = photo.shape[1:]
    n = size * max(1, math.ceil(side(square) / size))
    p = 2 * positions(square, n) / torch.tensor([W, H]) - 1  # grid_sample's coordinates: -1 and 1 are the photo's edges
    face = F.grid_sample(photo[None], p[None], mode="bicubic", padding_mode="reflection", align_corners=False)
    return soften(resize(face[0].clamp_(0, 1), (size, size)), outside(photo, square, size))


def positions(square, n):
    """p(a, b) of the middles of n x n pixels: (n, n, 2) float32, row by row."""
    (c, x), a = square.float(), (2 * torch.arange(n) + 1) / n - 1
    return c + a[:, None] * x + a[:, None, None] * rot90(x)


def outside(photo, square, n=256):
    """How far the pixels of an n x n crop lie outside the photo, in sides of the square, negative inside: (n, n)."""
    H, W = photo.shape[1:]
    p = positions(square, n)
    return torch.maximum(-p, p - torch.tensor([W, H])).amax(-1) / side(square)


def soften(face, d):
    """FFHQ's border, so that mirrored pixels do not pass for a face's own: face (3, S, S), d (S, S) of `outside`; same shape.

    A blur of 0.02 sides sets in 0.1 sides before the photo's edge and is full there; up to 0.3 sides beyond it the colour
    fades to the median. A face inside the photo stays as it is.
    """
    if d.max() <= 0:
        return face
    sigma = 0.02 * face.shape[-1]
    face = face.lerp(gaussian_blur(face, 2 * math.ceil(3 * sigma) + 1, sigma), (1 + 10 * d).clamp(0, 1))
    return face.lerp(face.flatten(1).median(1).values[:, None, None], (d / 0.3).clamp(0, 1))


# --- face -> photo --------------------------------------------------------------------------------------------------------


def mask(a, b):
    """How much of a pixel is restored, (h, w) as a, b: 1 on the face, a smooth step over the outer 0.35 of a rounded square."""
    t = ((1 - torch.hypot(a**2, b**2).sqrt()) / 0.35).clamp(0, 1)
    return t**2 * (3 - 2 * t)


def patch(photo, square, face, restored):
    """What a restored face changes: rows and columns of the photo (slices), their mask (h, w) and new pixels (3, h, w).

    face, restored: (3, S, S), before and after the network. Their difference is added to the photo, so that it keeps what
    S pixels cannot hold, and a network that changes nothing changes no pixel. It is added in the values that the network
    works in; in linear light the mask's border would differ by 0.05 grey levels (mean of two degraded portraits).
    """
    (c, x), (H, W) = square.float(), photo.shape[1:]
    left, top, right, bottom = (int(v) for v in torch.cat([box(square)[:2].floor(), box(square)[2:].ceil()]))
    rows, columns = slice(max(0, top), max(0, min(H, bottom))), slice(max(0, left), max(0, min(W, right)))
    p = torch.meshgrid(torch.arange(W)[columns] + 0.5, torch.arange(H)[rows] + 0.5, indexing="xy")
    p = torch.stack(p, -1) - c  # (h, w, 2)
    ab = torch.stack([p @ x, p @ rot90(x)], -1) / x.dot(x)
    n = min(face.shape[-1], math.ceil(side(square)))  # antialiasing, where the photo is coarser than the face
    change = resize(restored, (n, n)) - resize(face, (n, n))
    change = F.grid_sample(change[None], ab[None], mode="bicubic", padding_mode="border", align_corners=False)[0]
    return rows, columns, mask(*ab.unbind(-1)), (photo[:, rows, columns] + change).clamp_(0, 1)


def restore_photo(photo, squares, restore, size, upscale=1, batch=1):
    """A photo (3, H, W) with the faces in its squares restored, the last one on top: (3, upscale H, upscale W).

    restore: list of faces (3, size, size), `batch` at most -> list of the same; upscale: a whole number, by which the photo
    is enlarged bicubically. Outside the masks the pixels are those of the (enlarged) photo, bit for bit.
    """
    faces = [crop(photo, square, size) for square in squares]
    restored = [face for i in range(0, len(faces), batch) for face in restore(faces[i : i + batch])]
    out = resize(photo, tuple(upscale * n for n in photo.shape[1:])) if upscale > 1 else photo.clone()
    patches = [patch(out, upscale * each[0], *each[1:]) for each in zip(squares, faces, restored, strict=True)]
    for rows, columns, m, pixels in patches:
        out[:, rows, columns].lerp_(pixels, m)
    return out


def faces_of(path, photo, find, smallest=0):
    """A photo's faces, the largest first: list of (points, spread). Says how many are left out.

    find: from face_finder; smallest: px, the side of the smallest square.
    """
    faces = find(path, photo)
    steady = [face for face in faces if face[1] < UNSTEADY]
    large = [face for face in steady if side(square(face[0])) >= smallest]
    if unsteady := len(faces) - len(steady):
        commands.say(f"{path}: faces left out, as readings of their landmarks differ (a profile?): {unsteady}")
    if small := len(steady) - len(large):
        commands.say(f"{path}: faces left out, as they are smaller than {smallest} px: {small}")
    return large


def is_aligned(photo):
    """Whether a picture (3, H, W) may be an aligned crop: not wide or tall, and no face elsewhere (if there is a detector)."""
    H, W, L = *photo.shape[1:], max(photo.shape[1:])
    if L > 1.3 * min(H, W):
        return False
    try:
        faces = find_landmarks(photo, long_side=240, scales=(1,))
    except ValueError:  # no detector
        return True
    whole = torch.tensor([[W / 2, H / 2], [L / 2, 0]])
    return not faces or float((square(faces[0][0]) - whole).norm(dim=1).sum()) < 0.2 * L


# --- the command ----------------------------------------------------------------------------------------------------------


def cut_photos(args):
    """Cuts the faces out of the photos that the arguments name; returns 0, or 1 if some photos failed or show no face."""
    find = face_finder(args.landmarks)
    pairs, errors = plan_faces(args.photos, make_folder(args.out))
    rows, failed = [], sum(map(commands.complain, errors))
    for path, name in pairs:
        try:
            with commands.enough_memory(path, "make it smaller"):
                rows += cut(path, name, args.size, find)
        except (ValueError, OSError) as e:
            failed += commands.complain(e)
    if rows:
        write_csv(args.out / "manifest.csv", rows)
    return 1 if failed else 0


def cut(path, name, size, find):
    """Writes a photo's faces to name_0.png, name_1.png ...; their rows of the manifest. ValueError without a face."""
    photo, rows = read_image(path), []
    for i, (points, spread) in enumerate(faces_of(path, photo, find)):
        face, this = name.with_name(f"{name.name}_{i}.png"), square(points)
        write_image(face, crop(photo, this, size))
        numbers = dict(zip(("left", "top", "right", "bottom", *COLUMNS), [*box(this), *points.flatten()], strict=True))
        numbers |= {"spread": spread, "scale": size / side(this), "outside": (outside(photo, this) > 0).float().mean()}
        rows.append({"photo": str(path), "face": str(face)} | {key: f"{value:.4f}" for key, value in numbers.items()})
        commands.say(f"{path} -> {face}")
    if not rows:
        raise ValueError(f"expected a face, found none in {path}: leave it out, or give its landmarks with --landmarks")
    return rows


def main(args):
    return commands.run(cut_photos, args, memory="make the photos smaller", fault=2)


if __name__ == "__main__":
    sys.exit(main(ARGS))
