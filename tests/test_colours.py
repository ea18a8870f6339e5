"""ICC profiles become sRGB, and gray stays gray."""

import made
import numpy as np
import pytest
import torch
from made import file_of, noise, tensor
from PIL import Image

from plumbing import colours, pictures


def in_display_p3(pixels):
    """sRGB pixels as Display P3 writes them, by the matrices."""
    v = pixels / 255
    linear = np.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)
    linear = (linear @ np.array(made.SRGB) @ np.linalg.inv(made.DISPLAY_P3)).clip(0, 1)
    return np.round(255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)).astype(
        np.uint8
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_colours_of_a_profile_become_srgb(kind):
    pixels = np.concatenate([noise(), np.full((1, 13, 3), (230, 30, 30), np.uint8)])
    info = {"icc_profile": made.rgb_profile(made.DISPLAY_P3)} | ({"lossless": True} if kind == "WEBP" else {})
    assert in_display_p3(pixels)[-1, 0].tolist() == [211, 55, 45]
    x = pictures.decode_picture(file_of(in_display_p3(pixels), kind, **info), "a").x
    assert (x - tensor(pixels)).abs().max() <= 4 / 255 and (x - tensor(pixels))[:, -1].abs().max() < 1.5 / 255
    r, g, b = made.SRGB
    x = pictures.decode_picture(
        file_of(pixels[..., [1, 0, 2]], kind, **info | {"icc_profile": made.rgb_profile((g, r, b))}), "a"
    ).x
    assert (x - tensor(pixels)).abs().max() < 1.5 / 255
    same = file_of(pixels, kind, **info | {"icc_profile": colours.SRGB})
    assert torch.equal(pictures.decode_picture(same, "a").x, tensor(pixels))


def test_a_profile_of_more_than_a_megabyte_counts_too():
    pixels = noise()
    large = made.rgb_profile(made.DISPLAY_P3) + np.random.default_rng(0).bytes(1_200_000)
    ours, small = (
        pictures.decode_picture(file_of(pixels, icc_profile=profile), "a").x
        for profile in (large, made.rgb_profile(made.DISPLAY_P3))
    )
    assert torch.equal(ours, small) and not torch.equal(ours, tensor(pixels))


def test_gray_and_cmyk_profiles():
    gray = np.arange(256, dtype=np.uint8)[None]
    v = np.arange(256) / 255
    srgb = np.where(v > 0.0031308, 1.055 * v ** (1 / 2.4) - 0.055, 12.92 * v)
    for pixels in (gray, gray.astype(np.uint16) * 257):
        x = pictures.decode_picture(file_of(pixels, icc_profile=made.gray_profile()), "a").x
        assert pictures.is_gray(x) and np.abs(x[0, 0].numpy() - srgb).max() < 1 / 255
    x = pictures.decode_picture(file_of(gray, icc_profile=made.rgb_profile(made.DISPLAY_P3)), "a").x  # R = G = B in RGB
    assert pictures.is_gray(x) and np.abs(x[0, 0].numpy() - v).max() < 1.5 / 255

    def paints(c, m, y, k):  # cyan ink that is seen as magenta, and the other way round
        return [255 * (1 - m) * (1 - k), 255 * (1 - c) * (1 - k), 255 * (1 - y) * (1 - k)]

    magenta = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for kind in ("JPEG", "TIFF"):
        x = pictures.decode_picture(file_of(magenta, kind, icc_profile=made.cmyk_profile(paints)), "a").x
        assert (x[:, 4, 4] - torch.tensor([1.0, 0, 1])).abs().max() < 0.03
        assert pictures.decode_picture(file_of(magenta, kind), "a").x[:, 4, 4].tolist() == [0, 1, 1]


@pytest.mark.parametrize("profile", [b"junk", made.gray_profile(), made.rgb_profile(made.SRGB)[:300]])
def test_a_profile_that_is_broken_or_does_not_fit_is_ignored_with_a_line(profile, capsys):
    assert torch.equal(pictures.decode_picture(file_of(noise(), icc_profile=profile), "a.png").x, tensor(noise()))
    assert "a.png: its colour profile is broken" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "P", "1", "I;16"])
def test_gray_is_known_whatever_the_mode(mode):
    gray = Image.fromarray(noise()[..., 0])
    image = Image.fromarray(noise()[..., 0].astype(np.uint16) * 257) if mode == "I;16" else gray.convert(mode)
    assert pictures.is_gray(pictures.decode_picture(file_of(image), "a").x)
    tinted = noise()[..., :1].repeat(3, 2)
    tinted[3, 4, 1] ^= 1
    assert not pictures.is_gray(tensor(tinted))
