"""Reading and writing pictures: every kind of file that turns up, damaged ones too, and what must not be read."""

import struct
import sys
import zlib

import mutate
import numpy as np
import pytest
import torch
from made import DISPLAY_P3, chunk, exif, file_of, noise, rgb_profile, tensor
from PIL import Image

from plumbing import commands, files, pictures


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
def test_lossless_files_come_back_as_they_were_and_pillow_reads_them(tmp_path, suffix):
    pixels = noise()
    pictures.write_image(tmp_path / f"a{suffix}", tensor(pixels))
    assert torch.equal(pictures.read_image(tmp_path / f"a{suffix}"), tensor(pixels))
    assert np.array_equal(np.asarray(Image.open(tmp_path / f"a{suffix}").convert("RGB")), pixels)


def test_jpeg_is_written_in_full_colour(tmp_path):
    x = torch.zeros(3, 16, 16)
    x[0, :, 8:] = 1  # a red edge that 4:2:0 would smear
    x[:, ::2] *= 0.5
    pictures.write_image(tmp_path / "a.jpg", x)
    assert (pictures.read_image(tmp_path / "a.jpg") - x).abs().max() < 0.03
    assert not list(Image.open(tmp_path / "a.jpg").getexif())


def test_values_are_rounded_half_to_even_and_clipped():
    x = torch.tensor([-1.0, 0.5 / 255, 1.5 / 255, 2.4 / 255, 1.0, 7.0], dtype=torch.float64)
    assert pictures.to_uint8(x).tolist() == [0, 0, 2, 2, 255, 255]
    every = torch.arange(256)
    assert torch.equal(pictures.to_uint8(every / 255), every.to(torch.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = noise(6, 10)
    stored = {  # EXIF 2.3, tag 0x0112: how the pixels lie in the file
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 3),
    }[orientation](upright)  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(pictures.read_image(tmp_path / "a.png"), tensor(upright))


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0], pixels[0, :, 3] = 200, (0, 51, 255)  # red under alpha 0, 0.2, 1
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    x = pictures.read_image(tmp_path / "a.png") * 255
    assert x[0, 0].round().tolist() == [255, 244, 200] and x[1, 0].round().tolist() == [255, 204, 0]


def test_palette_gray_bilevel_and_transparent_palette(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, :, 1], pixels[2:, :, 2] = 255, 128
    palette = Image.fromarray(pixels).quantize(4)
    palette.save(tmp_path / "p.png")
    assert torch.equal(pictures.read_image(tmp_path / "p.png"), tensor(pixels))
    palette.save(tmp_path / "t.png", transparency=palette.getpixel((0, 0)))
    assert torch.equal(pictures.read_image(tmp_path / "t.png")[:, 0], torch.ones(3, 4))
    Image.fromarray(pixels[..., 1]).save(tmp_path / "g.png")
    assert torch.equal(pictures.read_image(tmp_path / "g.png"), tensor(pixels[..., 1:2].repeat(3, 2)))
    Image.fromarray(pixels[..., 1]).convert("1").save(tmp_path / "b.png")
    assert torch.equal(pictures.read_image(tmp_path / "b.png"), pictures.read_image(tmp_path / "g.png"))
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "c.jpg", quality=100)
    assert (pictures.read_image(tmp_path / "c.jpg") - tensor(pixels)).abs().max() < 0.06


def test_16_bit_gray_keeps_its_precision(tmp_path):
    values = np.array([[0, 1, 128, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    x = pictures.read_image(tmp_path / "a.png")
    assert x.shape == (3, 1, 4) and np.allclose(x[2].numpy(), values / 65535, atol=1e-7)


def test_content_counts_not_the_suffix(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert torch.equal(pictures.read_image(tmp_path / "a.jpg"), tensor(noise()))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.97])
def test_truncated_files_are_refused_by_name(tmp_path, kind, part):
    path = tmp_path / f"cut.{kind}"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"cut.{kind}.*replace it") as e:
        pictures.read_image(path)
    assert "\n" not in str(e.value)


def test_foreign_files_are_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(noise()).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "gif.png")
    for name in ("text.png", "gif.png"):
        with pytest.raises(ValueError, match=f"expected a PNG, JPEG, .* picture, got .*{name}"):
            pictures.read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        pictures.read_image(tmp_path / "missing.png")


@pytest.mark.parametrize("side, got", [(9000, "9000x9000"), (2**16, "far more|65536x65536")])
def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path, side, got):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=f"expected at most .*{got}.*bomb.png"):
        pictures.read_image(tmp_path / "bomb.png")


def test_too_little_memory_is_a_line_whoever_says_it(tmp_path, monkeypatch):
    cpu = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(cpu)):
        with pytest.raises(ValueError, match="expected enough memory for x.*make it smaller"):
            with commands.enough_memory("x", "make it smaller"):
                raise error
    with pytest.raises(RuntimeError, match="size mismatch"), commands.enough_memory("x", "no"):
        raise RuntimeError("size mismatch")  # a fault of the code is not hidden
    Image.fromarray(noise()).save(tmp_path / "a.png")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(pictures, "_to_tensors", full)
    with pytest.raises(ValueError, match="expected enough memory for .*a.png"):
        pictures.read_image(tmp_path / "a.png")


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(ValueError, match=".bmp"):
        pictures.write_image(tmp_path / "a.bmp", torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        pictures.write_image(tmp_path / "a.png", torch.zeros(4, 4))
    with pytest.raises(ValueError, match="NaN"):
        pictures.write_image(tmp_path / "a.png", torch.full((3, 4, 4), float("nan")))
    assert not list(tmp_path.iterdir())


def test_resize_is_bicubic_with_antialiasing():
    pixels = noise(48, 40)
    x = tensor(pixels)
    theirs = np.asarray(Image.fromarray(pixels).resize((20, 30), Image.BICUBIC)).transpose(2, 0, 1)
    ours = pictures.to_uint8(pictures.resize(x, (30, 20))).numpy()
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert torch.equal(pictures.resize(x[None], (30, 20))[0], pictures.resize(x, (30, 20)))
    assert pictures.resize(x, (48, 40)) is x
    edge = torch.zeros(3, 8, 8)
    edge[:, :, 4:] = 1
    assert pictures.resize(edge, (16, 16)).min() == 0 and pictures.resize(edge, (16, 16)).max() == 1


def test_square_takes_the_middle():
    x = torch.arange(12.0).expand(3, 6, 12) / 12
    assert torch.equal(pictures.square(x, 6)[0, 0] * 12, torch.arange(3.0, 9.0))
    assert pictures.square(x.transpose(1, 2), 4).shape == (3, 4, 4)


def test_16_bit_gray_keeps_its_transparency():
    values = np.array([[0, 500, 65535, 500]], np.uint16)
    picture = pictures.decode_picture(file_of(values, transparency=500), "a")
    assert picture.alpha[0, 0].tolist() == [1, 0, 1, 0]
    assert torch.equal(picture.x, torch.tensor([0.0, 1, 1, 1]).expand(3, 1, 4))


# --- good pictures that are not refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [(0x011A, 10, 1, struct.pack("<ii", -1, 0)), (0x0128, 2, 4, b"inch")])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_orientation_counts_whatever_the_other_tags_hold(odd, kind):
    turned = (0x0112, 3, 1, b"\6\0")
    if kind == "TIFF":
        data = file_of(noise(48, 64), "TIFF", tiffinfo={0x0112: 6, 0x011A: 1.0, 0x0128: 2})
        place = data.index(struct.pack("<HHI", odd[0], 3 if odd[0] == 0x0128 else 5, 1))
        data = data[:place] + struct.pack("<HHI", *odd[:3]) + odd[3][-4:] + data[place + 12 :]
    else:
        data = file_of(noise(48, 64), kind, exif=exif(turned, odd))
    assert pictures.decode_picture(data, "a").x.shape == (3, 64, 48)


def test_exif_data_that_is_none_costs_nothing():
    data = file_of(noise(), exif=b"Exif\0\0no directory")
    for metadata in ("basic", "gps", "none"):
        assert torch.equal(pictures.decode_picture(data, "a", metadata).x, tensor(noise()))


@pytest.mark.parametrize("extra", ["text", "profile", "bomb", "checksum", "checksum of tRNS"])
def test_what_stands_beside_a_pngs_pixels_does_not_matter(extra):
    plain = file_of(noise())
    header, pixels = plain[:33], plain[33:]  # signature and IHDR
    data = {
        "text": header + chunk(b"zTXt", b"w\0\0" + zlib.compress(b"x" * 1_100_000)) + pixels,
        "profile": header + chunk(b"iCCP", b"w\0\0" + zlib.compress(bytes(1_100_000))) + pixels,
        "bomb": header + chunk(b"iCCP", b"w\0\0" + zlib.compress(bytes(20_000_000))) + pixels,
        "checksum": header + chunk(b"tEXt", b"a\0b")[:-1] + b"?" + pixels,
        "checksum of tRNS": header + chunk(b"tRNS", bytes(6))[:-1] + b"?" + pixels,
    }[extra]
    assert torch.equal(pictures.decode_picture(data, "a").x, tensor(noise()))
    with pytest.raises(ValueError, match="whole picture"):
        pictures.decode_picture(data[:-30], "a")  # and what is cut is still refused


def test_a_wrong_checksum_costs_nothing_but_its_own_chunk():
    pixels = noise()
    pixels[0, 0] = 7
    plain = file_of(
        pixels,
        transparency=(7, 7, 7),
        icc_profile=rgb_profile(DISPLAY_P3),
        exif=exif((0x0112, 3, 1, b"\3\0")),
    )
    broken = plain[:33] + chunk(b"tEXt", b"a\0b")[:-1] + b"?" + plain[33:]
    ours, theirs = pictures.decode_picture(broken, "a"), pictures.decode_picture(plain, "a")
    assert torch.equal(ours.x, theirs.x) and torch.equal(ours.alpha, theirs.alpha) and ours.alpha[0, -1, -1] == 0


@pytest.mark.parametrize("suffix, kind", [(".jfif", "JPEG"), (".jpe", "JPEG"), (".tif", "TIFF"), (".TIFF", "TIFF"),
                                          (".bmp", "BMP"), (".avif", "AVIF")])  # fmt: skip
def test_further_kinds_of_files_are_read(tmp_path, suffix, kind):
    if suffix not in files.READ and suffix == ".avif":
        pytest.skip("this Pillow has no AVIF")
    (tmp_path / f"a{suffix}").write_bytes(file_of(mutate.picture(), kind, quality=95))
    (path,) = files.find_images(tmp_path)
    x = pictures.read_image(path)
    assert (x - tensor(np.asarray(mutate.picture()))).abs().max() < (0.06 if kind in ("JPEG", "AVIF") else 1e-6)


def test_heic_is_read_with_its_package_or_refused_in_a_line_that_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="got a.heic: pip install pillow-heif"):
        pictures.decode_picture(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "a.heic")
    monkeypatch.undo()
    pytest.importorskip("pillow_heif").register_heif_opener()
    x = pictures.decode_picture(file_of(mutate.picture(), "HEIF", quality=100), "a.heic").x
    assert (x - tensor(np.asarray(mutate.picture()))).abs().max() < 0.06


def test_32_bits_a_channel_are_refused():
    for pixels in (np.zeros((4, 4), np.float32), np.zeros((4, 4), np.int32)):
        with pytest.raises(ValueError, match="expected 8 or 16 bits a channel, got 32 in a.tif"):
            pictures.decode_picture(file_of(pixels, "TIFF"), "a.tif")


@pytest.mark.filterwarnings("ignore")  # Pillow's, on what is damaged
def test_mutated_files_are_read_or_refused_in_a_line_that_names_them(capsys):
    still = tensor(np.asarray(mutate.picture()))
    for name, data in mutate.mutated(60):
        if name.startswith("harmless"):
            assert (pictures.decode_picture(data, name).x - still).abs().mean() < 0.01, name
            continue
        try:
            x = pictures.decode_picture(data, name).x
            assert x.shape[0] == 3 and x.min() >= 0 and x.max() <= 1
        except ValueError as e:
            assert name in str(e) and "\n" not in str(e)
    assert all(line.endswith("is ignored") for line in capsys.readouterr().err.splitlines())
