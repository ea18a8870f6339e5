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
import csv
import io
import math
import sys
from pathlib import Path

from plumbing import commands


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Cut faces out of photos as FFHQ was cut: photo.jpg -> photo_0.png ...")
    p.add_argument("photos", nargs="+", metavar="PHOTO_OR_FOLDER", help="photos, or folders searched recursively")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="FACES", help="folder for faces and manifest.csv")
    p.add_argument("--size", type=commands.whole(16, 2048), default=512, help="side of a face, pixels (default 512)")
    p.add_argument("--landmarks", type=Path, metavar="CSV", help="read the landmarks from a file, instead of finding them")
    return p.parse_args(argv)


if __name__ == "__main__":
    ARGS = commands.begin(parse_args, "the faces that are written are whole, but stand in no manifest")

import torch
import torch.nn.functional as F

from plumbing.landmarks import COLUMNS, find_landmarks, load_detector, read_landmarks
from plumbing.pictures import find_images, make_folder, read_image, resize, write_bytes, write_image

UNSTEADY = 0.25  # spread of landmarks that are not to be trusted, as of a profile
TOO_SMALL = 48  # px, side of a square whose face a network would have to invent


# --- the square -------------------------------------------------------------------------------------------------------


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
    """The side of a square (2, 2), in the photo's pixels."""
    return 2 * float(square[1].norm())


def middles(n):
    """a or b at the middles of n pixels along a side: (n,) in (-1, 1)."""
    return (2 * torch.arange(n) + 1) / n - 1


def to_photo(square, n):
    """p(a, b) at the middles of n x n pixels: (n, n, 2)."""
    c, x = square.float()
    return c + middles(n)[:, None] * x + middles(n)[:, None, None] * rot90(x)


# --- photo -> face ----------------------------------------------------------------------------------------------------


def crop(photo, square, size):
    """The face in a square (2, 2) of a photo (3, H, W): (3, size, size). What lies outside the photo is mirrored.

    Bicubic, turned as the square is; where the photo is finer than the crop, at a whole multiple of size that is no
    coarser than the photo, and then reduced with antialiasing.
    """
    H, W = photo.shape[1:]
    n = size * max(1, math.ceil(side(square) / size))
    p = 2 * to_photo(square, n) / torch.tensor([W, H]) - 1
    face = F.grid_sample(photo[None], p[None], mode="bicubic", padding_mode="reflection", align_corners=False)
    return resize(face[0].clamp_(0, 1), (size, size))


def outside(photo, square, n=256):
    """How far each pixel of an n x n crop lies outside the photo, in sides of the square, negative inside: (n, n)."""
    H, W = photo.shape[1:]
    p = to_photo(square, n)
    return torch.maximum(-p, p - torch.tensor([W, H])).amax(-1) / side(square)


def soften(face, d):
    """FFHQ's border: what is mirrored would else be learnt as a face's own. face (3, S, S), d (S, S) from `outside`.

    A blur of 0.02 sides sets in 0.1 sides before the photo's border and is full there; from there to 0.3 sides beyond it
    the colour fades to the median. A crop that does not leave the photo stays as it is.
    """
    if d.max() <= 0:
        return face
    face = face.lerp(gaussian_blur(face, 0.02 * face.shape[-1]), (1 + 10 * d).clamp(0, 1))
    return face.lerp(face.flatten(1).median(1).values[:, None, None], (d / 0.3).clamp(0, 1))


def gaussian_blur(x, sigma):
    """x (3, H, W) with a Gaussian of sigma pixels, borders mirrored; same shape."""
    r = math.ceil(3 * sigma)
    k = torch.exp(-(torch.arange(-r, r + 1) ** 2) / (2 * sigma**2))
    x = F.conv2d(F.pad(x[:, None], (r, r, r, r), mode="reflect"), (k / k.sum()).view(1, 1, 1, -1))
    return F.conv2d(x, (k / k.sum()).view(1, 1, -1, 1))[:, 0]


# --- face -> photo ----------------------------------------------------------------------------------------------------


def mask(a, b):
    """How much of a pixel comes from the restored face: 1 in the middle, 0 from the square's edge on; shape of a, b.

    A smooth step over the outer 0.35 of a rounded square, far from the face itself.
    """
    t = ((1 - (a**4 + b**4) ** 0.25) / 0.35).clamp(0, 1)
    return t**2 * (3 - 2 * t)


def patch(photo, square, face, restored):
    """What a restored face changes in the photo: its rows and columns (slices), the mask (h, w), the pixels (3, h, w).

    face, restored: (3, S, S), the crop before and after the network. The photo gets their difference, so it keeps the
    detail that S pixels cannot hold, and a network that changes nothing changes no pixel. The difference is added in the
    values that the network works in: there is no light to mix, and linear light would move the mask's border by less than
    a grey level.
    """
    (c, x), (H, W), S = square.float(), photo.shape[1:], face.shape[-1]
    reach = x.abs() + rot90(x).abs()  # half of the box around the square
    left, top = (int(v) for v in (c - reach).floor().clamp(min=0))
    right, bottom = (int(v) for v in (c + reach).ceil().minimum(torch.tensor([W, H])))
    columns, rows = torch.arange(left, right) + 0.5, torch.arange(top, bottom) + 0.5
    p = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (h, w, 2)
    ab = torch.stack([(p - c) @ x, (p - c) @ rot90(x)], -1) / x.dot(x)
    n = min(S, math.ceil(side(square)))  # antialiasing, where the photo is coarser than the face
    change = resize(restored, (n, n)) - resize(face, (n, n))
    change = F.grid_sample(change[None], ab[None], mode="bicubic", padding_mode="border", align_corners=False)[0]
    rows, columns = slice(top, bottom), slice(left, right)
    return rows, columns, mask(*ab.unbind(-1)), (photo[:, rows, columns] + change).clamp_(0, 1)


def restore_photo(photo, squares, restore, size, upscale=1):
    """A photo (3, H, W) with the faces in its squares restored, one over the other where they meet: (3, NH, NW).

    restore: list of N crops (3, size, size) -> list of N, both in [0, 1]; upscale: the whole number N by which the photo is
    enlarged, bicubically. Pixels outside all masks are those of the (enlarged) photo, bit for bit.
    """
    faces = [face_in(photo, square, size) for square in squares]
    out = resize(photo, tuple(upscale * n for n in photo.shape[1:])) if upscale > 1 else photo.clone()
    patches = [
        patch(out, upscale * square, *pair) for square, *pair in zip(squares, faces, restore(faces), strict=True)
    ]
    for rows, columns, m, pixels in patches:
        out[:, rows, columns].lerp_(pixels, m)
    return out


# --- which faces ------------------------------------------------------------------------------------------------------


def faces_of(path, photo, landmarks=None):
    """The squares of a photo's faces, the largest first, with their landmarks and spread: list of (square, points, spread).

    landmarks: from read_landmarks, by path or by file name; without them they are found. Unsteady ones are left out.
    """
    if landmarks is None:
        found = find_landmarks(photo)
    else:
        found = landmarks.get(str(path), landmarks.get(path.name, []))
    return [(square(points), points, spread) for points, spread in found]


# --- the command ------------------------------------------------------------------------------------------------------
