"""What a result carries: our mark, the profile of sRGB, transparency, and what a person would miss of the EXIF data."""

import io
import struct

import numpy as np
import pytest
import torch
from made import exif, file_of, noise, tensor
from PIL import ExifTags, Image, ImageCms

from plumbing import metadata, pictures


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jfif", ".webp"])
def test_a_result_says_what_it_is_and_in_which_colours_and_nothing_of_when(tmp_path, suffix, monkeypatch):
    pictures.write_result(tmp_path / f"a{suffix}", tensor(noise()))
    pictures.write_image(tmp_path / f"b{suffix}", tensor(noise()))
    assert metadata.is_result(tmp_path / f"a{suffix}") and not metadata.is_result(tmp_path / f"b{suffix}")
    assert not metadata.is_result(tmp_path / "missing.png")
    ours, theirs = pictures.read_image(tmp_path / f"a{suffix}"), pictures.read_image(tmp_path / f"b{suffix}")
    assert torch.equal(ours, theirs)
    with Image.open(tmp_path / f"a{suffix}") as image:
        profile = image.info["icc_profile"]
        assert not image.getexif()
    name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    assert "sRGB" in name and profile[24:36] == bytes(12)  # the time of day at which Little CMS made it


def test_a_cut_out_stays_a_cut_out(tmp_path):
    pixels = np.concatenate([noise(), np.full((9, 13, 1), 255, np.uint8)], 2)
    pixels[:, :4, 3], pixels[:, 4:8, 3] = 0, 128
    picture = pictures.decode_picture(file_of(pixels), "a")
    assert torch.equal(picture.alpha, tensor(pixels[..., 3:]))
    x_hat = 1 - 0.9 * (1 - picture.x)
    for suffix in (".png", ".webp", ".jpg"):
        pictures.write_result(tmp_path / f"a{suffix}", x_hat, like=picture)
        back = pictures.read_picture(tmp_path / f"a{suffix}")
        assert (back.x - x_hat).abs().max() < (0.1 if suffix == ".jpg" else 1.1 / 255)  # laid over white
        assert back.alpha is None if suffix == ".jpg" else torch.equal(back.alpha, picture.alpha)
    pictures.write_result(tmp_path / "b.png", pictures.resize(x_hat, (18, 26)), like=picture)
    alpha = pictures.read_picture(tmp_path / "b.png").alpha
    assert (alpha - pictures.resize(picture.alpha, (18, 26))).abs().max() < 0.6 / 255


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("choice", ["basic", "gps", "none"])
def test_date_and_camera_are_kept_and_the_place_where_asked_for(tmp_path, kind, choice):
    given = Image.Exif()
    given.update({0x0112: 6, 0x010F: "Maker", 0x0132: "2020:01:02 03:04:05", 0x013B: b"A. Name"})
    given.get_ifd(ExifTags.IFD.Exif).update({0x9003: "2020:01:02 03:04:05", 0x927C: b"maker's own"})
    given.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (52.0, 31.0, 12.0)})
    (tmp_path / "a").write_bytes(file_of(noise(), kind, exif=given.tobytes()))
    picture = pictures.read_picture(tmp_path / "a", choice)
    for suffix in (".png", ".jpg", ".webp"):
        pictures.write_result(tmp_path / f"b{suffix}", picture.x, like=picture)
        with Image.open(tmp_path / f"b{suffix}") as image:
            assert image.size == (9, 13)
            kept = image.getexif()
        shot, place = kept.get_ifd(ExifTags.IFD.Exif), kept.get_ifd(ExifTags.IFD.GPSInfo)
        texts = {tag: text for tag, text in kept.items() if tag not in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)}
        if choice == "none":
            assert not kept
            continue
        assert texts == {0x010F: "Maker", 0x0132: "2020:01:02 03:04:05", 0x013B: "A. Name"}
        assert shot == {0x9003: "2020:01:02 03:04:05"}
        assert place == ({1: "N", 2: (52.0, 31.0, 12.0)} if choice == "gps" else {})


def test_exif_data_that_cannot_be_written_is_left_out(tmp_path):
    long = exif(
        (0x010E, 2, 70_000, b"x" * 70_000), (0x010F, 2, 7, b"M\xc3\xa4ker\0"), (0x0132, 5, 1, struct.pack("<II", 1, 0))
    )
    picture = pictures.decode_picture(file_of(noise(), "PNG", exif=long), "a")
    pictures.write_result(tmp_path / "a.jpg", picture.x, like=picture)
    with Image.open(tmp_path / "a.jpg") as image:
        assert dict(image.getexif()) == {0x010F: "M\xc3\xa4ker"}  # UTF-8 stays UTF-8
