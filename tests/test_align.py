"""align.py and plumbing/landmarks.py: FFHQ's square, the crop, the way back into the photo, landmarks from a file and found."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image

import align
import restore
from align import crop, outside, patch, restore_photo, rot90, side, soften, square
from plumbing.landmarks import COLUMNS, MIRRORED, find_landmarks, load_detector, read_landmarks
from plumbing.pictures import read_image, resize, to_uint8, write_image

ROOT = align.Path(__file__).resolve().parent.parent
# where faces lie in FFHQ at 512 px: facexlib's template, which GFPGAN and CodeFormer align to
TEMPLATE = [[192.98, 239.95], [318.90, 240.19], [256.63, 314.02], [201.26, 371.41], [313.09, 371.15]]
# read off by eye for samples/README.md, and followed into the pictures there: eyes and the middle of the mouth
BY_EYE = {
    "collins": [[192.7, 243.4], [320.9, 243.4], [256.1, 359.4]],
    "hopper": [[192.0, 243.1], [319.9, 243.1], [258.4, 383.4]],
}


# where samples/README.md's commands lay the prints in group.jpg: a print's scale, angle and middle
GROUP = ROOT / "samples/group.jpg"
PLACES = (("collins", 420 / 512, -8, (299.8, 319.8)), ("hopper", 340 / 512, 13, (737.9, 367.9)))


def points(*place):
    """The template, turned, scaled and moved."""
    return placed(TEMPLATE, *place)


def placed(xy, scale=1.0, degrees=0.0, middle=(0.0, 0.0)):
    """Points of a picture of 512 px that lies elsewhere, turned by degrees and scaled, (..., 2)."""
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return (torch.tensor(xy, dtype=torch.float64) - 256) @ turn * scale + torch.tensor(middle)


def smooth_photo(h=300, w=400, seed=0, detail=12):
    """A photo without detail finer than about `detail` pixels, so that resampling it hardly changes it."""
    noise = torch.rand(3, h // detail, w // detail, generator=torch.Generator().manual_seed(seed))
    return to_uint8(0.25 + 0.5 * resize(noise, (h, w))).float() / 255


def negative(faces):
    return [1 - face for face in faces]


def levels(a, b):
    """The largest difference of two pictures in grey levels."""
    return float((a - b).abs().max()) * 255


# --- the square ---


@pytest.mark.parametrize("degrees", [0, 30, -100])
def test_square_of_the_ffhq_template_is_the_picture(degrees):
    c, x = square(points(0.25, degrees, (200.0, 150.0)))
    angle = math.radians(degrees)
    assert (c - torch.tensor([200.0, 150.0])).norm() < 0.01 * 128
    assert (x - 64 * torch.tensor([math.cos(angle), math.sin(angle)])).norm() < 0.02 * 64


def test_square_takes_the_longer_of_eyes_and_mouth():
    p = torch.tensor([[-10, 0], [10, 0], [0, 5], [-5, 30], [5, 30]], dtype=torch.float64)
    assert side(square(p)) == pytest.approx(2 * 1.8 * 30) and square(p)[0].tolist() == [0, 3]
    p[3:, 1] = 10
    assert side(square(p)) == pytest.approx(2 * 2.0 * 20) and square(p)[0].tolist() == [0, 1]


# --- the crop ---


@pytest.mark.parametrize("degrees, scale", [(0, 0.3), (25, 0.3), (-160, 0.2), (10, 1.3)])
def test_landmarks_of_the_crop_lie_at_ffhqs_place(degrees, scale):
    p = points(scale, degrees, (400.0, 400.0)).float()
    y, x = torch.meshgrid(torch.arange(800) + 0.5, torch.arange(800) + 0.5, indexing="ij")
    dots = torch.exp(-((x - p[:, 0, None, None]) ** 2 + (y - p[:, 1, None, None]) ** 2) / 32)  # a channel each
    face, r = crop(dots, square(p), 512), torch.arange(512) + 0.5
    found = torch.stack([(face.sum(1) * r).sum(1), (face.sum(2) * r).sum(1)], 1) / face.sum((1, 2))[:, None]
    assert (found - torch.tensor(TEMPLATE)).norm(dim=1).max() < 0.015 * 512


@pytest.mark.parametrize("size", [96, 200])
def test_crop_is_pillows_quadrilateral(size):
    photo, s = smooth_photo(), square(points(0.35, 20, (200.0, 150.0)))
    c, x = s
    y = rot90(x)
    corners = torch.stack([c - x - y, c - x + y, c + x + y, c + x - y]).flatten().tolist()
    picture = Image.fromarray(to_uint8(photo).permute(1, 2, 0).numpy())
    big = picture.transform((4 * size, 4 * size), Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)
    pillow = np.asarray(big.resize((size, size), Image.Resampling.LANCZOS)).transpose(2, 0, 1) / 255
    assert levels(crop(photo, s, size), torch.from_numpy(pillow)) < 2


def test_crop_is_antialiased():
    stripes = (torch.arange(512) % 2).float().expand(3, 512, 512)
    face = crop(stripes, square(points(0.8, 3, (256.0, 256.0))), 64)
    assert (face - 0.5).abs().max() < 0.1


def test_a_square_that_leaves_the_photo_is_mirrored_and_softened():
    photo, s = smooth_photo(), square(points(0.4, 15, (60.0, 70.0)))
    padded = torch.from_numpy(np.pad(photo.numpy(), ((0, 0), (200, 200), (200, 200)), mode="symmetric"))
    mirrored = crop(padded, s + torch.tensor([[200.0, 200.0], [0.0, 0.0]]), 128)
    d = outside(photo, s, 128)
    assert 0.1 < (d > 0).float().mean() < 0.7
    assert levels(crop(photo, s, 128), soften(mirrored, d)) < 0.1
    inside = d < -0.1
    assert inside.any() and levels(crop(photo, s, 128)[:, inside], mirrored[:, inside]) < 0.1


def test_soften_blurs_before_the_border_and_fades_to_the_median_beyond_it():
    noise = torch.rand(3, 100, 100, generator=torch.Generator().manual_seed(0))
    d = torch.linspace(-0.4, 0.6, 100).expand(100, 100)  # the border is a vertical line
    face = soften(noise, d)
    assert torch.equal(face[:, :, :29], noise[:, :, :29])
    deviation = face.std(1).mean(0)  # (100,) of a column
    assert deviation[41] < 0.5 * deviation[20] and deviation[55] < 0.6 * deviation[41]
    assert (deviation[71:] < 1e-6).all() and (face[:, 0, 80] - noise.flatten(1).median(1).values).abs().max() < 0.02
    assert soften(noise, -d.abs() - 0.01) is noise


# --- back into the photo ---


@pytest.mark.parametrize("size", [64, 300])
def test_identity_changes_no_pixel(size):
    photo = torch.rand(3, 200, 240, generator=torch.Generator().manual_seed(0))
    squares = [square(points(0.3, 20, (120.0, 100.0))), square(points(0.2, 0, (30.0, 20.0)))]
    assert torch.equal(restore_photo(photo, squares, lambda faces: faces, size), photo)


@pytest.mark.parametrize("upscale", [1, 2])
def test_outside_the_mask_the_photo_stays_bit_for_bit(upscale):
    photo, s = smooth_photo(), square(points(0.3, 20, (150.0, 120.0)))
    result = restore_photo(photo, [s], negative, 64, upscale)
    photo = resize(photo, (upscale * 300, upscale * 400))
    y, x = torch.meshgrid(torch.arange(upscale * 300) + 0.5, torch.arange(upscale * 400) + 0.5, indexing="ij")
    away = (torch.stack([x, y], -1) - upscale * s[0]).norm(dim=-1) / (upscale * side(s) / 2)
    outer, inner = away > 2**0.5, away < 0.6
    assert result.shape == photo.shape and outer.any() and inner.any()
    assert torch.equal(result[:, outer], photo[:, outer])
    assert (result - (1 - photo)).abs()[:, inner].mean() < 0.02


@pytest.mark.parametrize("size, scale, degrees", [(64, 0.3, 20), (512, 0.3, -70), (150, 0.3, 180), (100, 0.12, 10)])
def test_a_restored_face_lands_where_it_was_cut(size, scale, degrees):
    """The faces of another photo as what the network made: where the mask is full, the result is that photo."""
    photo, other = smooth_photo(detail=30), smooth_photo(seed=1, detail=30)
    s = square(points(scale, degrees, (180.0, 140.0)))
    result = restore_photo(photo, [s], lambda faces: [crop(other, s, size)], size)
    rows, columns, m, _ = patch(photo, s, crop(photo, s, size), crop(other, s, size))
    full = m == 1
    assert full.sum() > 0.25 * side(s) ** 2
    assert levels(result[:, rows, columns][:, full], other[:, rows, columns][:, full]) <= 2


def test_the_mask_is_smooth():
    t = torch.linspace(-1.2, 1.2, 2401)
    for a, b in ((t, 0 * t), (t, t), (t, 0.9 * torch.ones_like(t))):
        m = align.mask(a, b)
        assert m.min() == 0 and m.max() <= 1 and m.diff().abs().max() < 0.006
        assert (m[(a.abs() >= 1) | (b.abs() >= 1)] == 0).all()


def flipped(v, width):
    return torch.stack([width - v[..., 0], v[..., 1]], -1)


def test_mirroring_and_turning_the_photo_commute_with_restoring():
    photo, p = smooth_photo(), points(0.3, 20, (150.0, 120.0))

    def restored(photo, p):  # by a network that knows no direction
        return restore_photo(
            photo, [square(p)], lambda faces: [1 - resize(resize(f, (40, 40)), (64, 64)) for f in faces], 64
        )

    result = restored(photo, p)
    mirrored = restored(photo.flip(-1), flipped(p, 400)[MIRRORED])
    assert levels(mirrored.flip(-1), result) < 0.1
    turned = restored(photo.rot90(-1, (1, 2)), torch.stack([300 - p[:, 1], p[:, 0]], 1))
    assert levels(turned.rot90(1, (1, 2)), result) < 0.1


def test_scaling_the_photo_commutes_with_restoring():
    photo, p = smooth_photo(detail=25), points(0.3, 20, (150.0, 120.0))
    twice = restore_photo(resize(photo, (600, 800)), [square(2 * p)], negative, 64)
    assert levels(twice, restore_photo(photo, [square(p)], negative, 64, upscale=2)) < 3


def test_where_faces_meet_each_is_restored_once():
    photo = torch.full((3, 200, 300), 0.25)
    squares = [square(points(0.3, 0, (120.0, 100.0))), square(points(0.3, 0, (180.0, 100.0)))]
    result = restore_photo(photo, squares, lambda faces: [face + 0.25 for face in faces], 64)
    assert result.max() == pytest.approx(0.5, abs=1e-6)


# --- landmarks from a file ---


def write_csv(path, rows, columns=("photo", *COLUMNS)):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([columns, *rows])
    return path


def test_landmarks_from_a_file_the_largest_face_first(tmp_path):
    small, large = points(0.1), points(0.5)
    rows = [
        ["a.png", *small.flatten().tolist()],
        ["b.png", *small.flatten().tolist()],
        ["a.png", *large.flatten().tolist()],
    ]
    found = read_landmarks(write_csv(tmp_path / "l.csv", rows))
    assert [len(found[name]) for name in ("a.png", "b.png")] == [2, 1]
    assert torch.equal(found["a.png"][0][0], large) and torch.equal(found["a.png"][1][0], small)


NUMBERS = [str(v) for v in points(0.1).flatten().tolist()]


@pytest.mark.parametrize(
    "columns, row, text",
    [
        (("photo", *COLUMNS[:-1]), ["a.png", *NUMBERS[:-1]], "no right_mouth_y"),
        (COLUMNS, NUMBERS, "no photo"),
        (("photo", *COLUMNS), ["a.png", *NUMBERS[:-1], "left"], "line 2"),
        (("photo", *COLUMNS), ["a.png", *NUMBERS[:-1]], "line 2"),
        (("photo", *COLUMNS), ["a.png", *NUMBERS[:-1], "nan"], "line 2"),
        (("photo", *COLUMNS), ["a.png", *(["5"] * 10)], "line 2"),
    ],
)
def test_a_file_without_landmarks_is_refused_in_one_line(tmp_path, columns, row, text):
    path = write_csv(tmp_path / "l.csv", [row], columns)
    with pytest.raises(ValueError, match="expected .*, got .*: ") as e:
        read_landmarks(path)
    assert text in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)


def test_no_table_at_all_is_refused(tmp_path):
    for data in (b"", b"\x00\xff\xfe", (ROOT / "samples/clean/hopper.png").read_bytes()):
        (tmp_path / "l.csv").write_bytes(data)
        with pytest.raises(ValueError, match="l.csv"):
            read_landmarks(tmp_path / "l.csv")
    with pytest.raises(OSError, match="does not exist"):
        read_landmarks(tmp_path / "none.csv")


# --- the command ---


@pytest.fixture
def photos(tmp_path):
    """A folder with a photo of two faces, one of them over the border, one photo without a face, and landmarks for them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    write_image(folder / "two.png", smooth_photo())
    write_image(folder / "none.png", smooth_photo(seed=1))
    rows = [
        ["two.png", *points(s, 10, shift).flatten().tolist()]
        for s, shift in ((0.1, (300.0, 200.0)), (0.3, (60.0, 60.0)))
    ]
    write_csv(tmp_path / "l.csv", rows)
    return folder


def run(*args):
    return align.main(align.parse_args([str(arg) for arg in args]))


def test_align_writes_every_face_and_its_manifest(photos, tmp_path, capsys):
    assert run(photos, "-o", tmp_path / "faces", "--size", 64, "--landmarks", tmp_path / "l.csv") == 1
    assert "none.png" in capsys.readouterr().err
    with open(tmp_path / "faces/manifest.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["face"] for row in rows] == [str(tmp_path / "faces" / name) for name in ("two_0.png", "two_1.png")]
    assert {row["photo"] for row in rows} == {str(photos / "two.png")}
    large, small = rows
    assert float(large["scale"]) == pytest.approx(64 / (0.3 * 512), rel=0.02)
    assert float(small["scale"]) == pytest.approx(64 / (0.1 * 512), rel=0.02)
    assert 0.1 < float(large["outside"]) < 0.6 and float(small["outside"]) == 0
    middle = (float(small["left"]) + float(small["right"])) / 2, (float(small["top"]) + float(small["bottom"])) / 2
    assert middle == pytest.approx((300, 200), abs=1)
    face = read_image(tmp_path / "faces/two_1.png")
    assert levels(face, crop(read_image(photos / "two.png"), square(points(0.1, 10, (300.0, 200.0))), 64)) <= 1


def test_a_manifest_gives_the_same_faces_again(photos, tmp_path):
    run(photos, "-o", tmp_path / "a", "--size", 64, "--landmarks", tmp_path / "l.csv")
    run(photos, "-o", tmp_path / "b", "--size", 64, "--landmarks", tmp_path / "a/manifest.csv")
    for name in ("two_0.png", "two_1.png"):
        assert levels(read_image(tmp_path / "a" / name), read_image(tmp_path / "b" / name)) <= 1


def test_unsteady_and_small_faces_are_left_out_and_counted(capsys):
    faces = [(points(0.3), 0.1), (points(0.2), 0.3), (points(0.05), 0.1)]
    kept = align.faces_of("x.png", None, lambda *_: faces, smallest=40)
    assert [spread for _, spread in kept] == [0.1] and torch.equal(kept[0][0], points(0.3))
    out = capsys.readouterr().out
    assert "readings" in out and "40 px" in out and len(out.splitlines()) == 2


def test_faces_never_overwrite_a_photo_or_each_other(photos, tmp_path, capsys):
    landmarks = "--landmarks", tmp_path / "l.csv"
    assert run(photos, "-o", tmp_path, *landmarks) == 2
    assert "holds" in capsys.readouterr().err and not (tmp_path / "manifest.csv").exists()
    write_image(photos / "two.jpg", smooth_photo())
    run(photos, "-o", tmp_path / "faces", *landmarks)
    assert "rename one" in capsys.readouterr().err


def test_without_the_detector_one_line_names_the_pip_command(photos, tmp_path, capsys, monkeypatch):
    load_detector.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "facenet_pytorch", None)
    assert run(photos, "-o", tmp_path / "faces") == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps facenet-pytorch" in error and len(error.splitlines()) == 1
    assert align.is_aligned(torch.zeros(3, 100, 100)) and align.is_aligned(torch.zeros(3, 218, 178))
    assert not align.is_aligned(torch.zeros(3, 100, 140)) and not align.is_aligned(torch.zeros(3, 140, 100))


# --- restore.py --photo ---


@pytest.fixture
def restore_command(monkeypatch, tmp_path):
    """restore.py with a network that gives the negative, and landmarks of samples/group.jpg."""
    monkeypatch.setattr(restore, "load_model", lambda *_: (lambda y: 1 - y, 64))
    write_csv(tmp_path / "l.csv", [["group.jpg", *points(*place).flatten().tolist()] for _, *place in PLACES])

    def command(*args):
        return restore.main(restore.parse_args([*map(str, args), "--color-fix", "none", "--device", "cpu"]))

    return command


@pytest.mark.parametrize("upscale", [1, 2])
def test_restore_photo_restores_the_faces_and_nothing_else(restore_command, tmp_path, capsys, upscale):
    out = tmp_path / "out.png"
    options = ["--photo", "--landmarks", tmp_path / "l.csv", *(["--upscale", 2] if upscale == 2 else [])]
    assert restore_command(GROUP, "-o", out, *options) == 0
    assert "faces: 2" in capsys.readouterr().out
    photo, result = read_image(GROUP), read_image(out)
    photo = to_uint8(resize(photo, (upscale * 640, upscale * 960))) / 255
    assert result.shape == photo.shape
    changed = (result != photo).any(0).float()
    assert changed[:, : 20 * upscale].sum() == 0 and changed[: 40 * upscale].sum() == 0
    for _, scale, _, (x, y) in PLACES:
        r = round(0.3 * 512 * scale * upscale)
        x, y = round(x * upscale), round(y * upscale)
        inner = slice(y - r, y + r), slice(x - r, x + r)
        assert (result[:, *inner] - (1 - photo[:, *inner])).abs().mean() < 0.05


def test_a_photo_without_a_face_is_copied_and_named(restore_command, tmp_path, capsys):
    write_image(tmp_path / "none.png", smooth_photo())
    assert restore_command(tmp_path / "none.png", "--photo", "--landmarks", tmp_path / "l.csv") == 1
    assert torch.equal(read_image(tmp_path / "none_restored.png"), smooth_photo())
    error = capsys.readouterr().err
    assert "none.png" in error and len(error.splitlines()) == 1


def test_landmarks_of_another_size_are_refused(restore_command, tmp_path, capsys):
    write_image(tmp_path / "group.jpg", resize(read_image(GROUP), (160, 240)))
    out = tmp_path / "out.png"
    assert restore_command(tmp_path / "group.jpg", "-o", out, "--photo", "--landmarks", tmp_path / "l.csv") == 1
    assert "240 x 160" in capsys.readouterr().err and not out.exists()


def test_a_picture_that_is_no_crop_is_restored_with_a_hint(restore_command, tmp_path, capsys):
    assert restore_command(GROUP, ROOT / "samples/clean/hopper.png", "-o", tmp_path / "out") == 0
    wide, crop_ = capsys.readouterr().out.splitlines()
    assert "--photo" in wide and "--photo" not in crop_


def test_upscale_and_landmarks_belong_to_photo(capsys):
    for options in (["--upscale", "2"], ["--landmarks", "l.csv"]):
        with pytest.raises(SystemExit, match="2"):
            restore.parse_args(["x.png", *options])
        assert "--photo" in capsys.readouterr().err


# --- the detector, where it is installed ---


@pytest.fixture(scope="module")
def group():
    """samples/group.jpg, if facenet-pytorch is installed."""
    pytest.importorskip("facenet_pytorch")
    return read_image(GROUP)


def test_the_detector_finds_what_an_eye_finds(group):
    faces = find_landmarks(group)
    assert len(faces) == 2
    for (p, spread), (name, *place) in zip(faces, PLACES, strict=True):
        eyes_and_mouth = placed(BY_EYE[name], *place)
        found = torch.stack([p[0], p[1], (p[3] + p[4]) / 2])
        e = (eyes_and_mouth[1] - eyes_and_mouth[0]).norm()
        assert (found - eyes_and_mouth).norm(dim=1).max() < 0.1 * e and spread < align.UNSTEADY


def test_the_detector_sees_a_mirrored_photo_mirrored(group):
    faces, mirrored = find_landmarks(group), find_landmarks(group.flip(-1))
    for (p, _), (q, _) in zip(faces, mirrored, strict=True):
        assert (flipped(q, 960)[MIRRORED] - p).abs().max() < 0.5


def test_the_detector_finds_no_face_where_there_is_none():
    pytest.importorskip("facenet_pytorch")
    for photo in (torch.zeros(3, 300, 200), torch.rand(3, 90, 90), torch.zeros(3, 1, 1), torch.rand(3, 5, 900)):
        assert find_landmarks(photo) == []


def test_is_aligned_knows_a_crop_from_a_photo(group):
    assert all(align.is_aligned(read_image(path)) for path in sorted((ROOT / "samples").rglob("hopper.png")))
    assert not align.is_aligned(group[:, :, 320:])
