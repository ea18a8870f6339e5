"""Reading and writing pictures: every kind of file that turns up, damaged ones too, and writes that fail half-way."""

import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing import commands, pictures


def noise(h=9, w=13, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def tensor(pixels):
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)


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
        with pytest.raises(ValueError, match=f"expected a PNG, JPEG or WebP picture, got .*{name}"):
            pictures.read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        pictures.read_image(tmp_path / "missing.png")


@pytest.mark.parametrize("side, got", [(9000, "9000x9000"), (2**16, "far more|65536x65536")])
def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path, side, got):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=f"expected at most .*{got}.*bomb.png"):
        pictures.read_image(tmp_path / "bomb.png")


def test_find_images(tmp_path):
    for name in ("b/2.JPG", "b/1.webp", "a.png", "b/notes.txt", ".hidden/3.png", "b/._1.png", "10.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [p.relative_to(tmp_path).as_posix() for p in pictures.find_images([tmp_path])]
    assert names == ["10.jpeg", "a.png", "b/1.webp", "b/2.JPG"]
    twice = pictures.find_images([tmp_path / "b" / "2.JPG", tmp_path])
    assert twice[0].name == "2.JPG" and len(twice) == 4
    assert pictures.find_images(str(tmp_path / "a.png")) == [tmp_path / "a.png"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pictures.find_images([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="notes.txt"):
        pictures.find_images([tmp_path / "b" / "notes.txt"])


def test_an_unreadable_folder_is_an_error_not_an_empty_one(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match=f"expected a folder that can be read, got {tmp_path}.*leave it out"):
        pictures.find_images([tmp_path])


def test_what_is_no_file_or_cannot_be_read_is_said(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")  # to open it would be to wait for ever
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(OSError, match=f"expected a file, got .*{name}"):
            pictures.read_image(tmp_path / name)
    assert sorted(p.name for p in pictures.find_images([tmp_path])) == ["link.png", "pipe.png"]
    with pytest.raises(FileNotFoundError, match="link.png.*does not exist"):
        pictures.read_image(tmp_path / "link.png")

    def refused(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PermissionError, match="expected a file that can be read, got .*a.png"):
        pictures.read_image(tmp_path / "a.png")


def test_too_little_memory_is_a_line_whoever_says_it(tmp_path, monkeypatch):
    cpu = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(cpu)):
        with pytest.raises(ValueError, match="expected enough memory for x.*make it smaller"):
            with commands.enough_memory("x", "make it smaller"):
                raise error
    with pytest.raises(RuntimeError, match="size mismatch"), commands.enough_memory("x", "no"):
        raise RuntimeError("size mismatch")  # a fault of the code is not hidden
    Image.fromarray(noise()).save(tmp_path / "a.png")

    def full(_):
        raise MemoryError

    monkeypatch.setattr(pictures, "_to_tensor", full)
    with pytest.raises(ValueError, match="expected enough memory for .*a.png"):
        pictures.read_image(tmp_path / "a.png")


def test_a_folder_that_cannot_be_made_or_written_is_said(tmp_path, monkeypatch):
    assert pictures.make_folder(tmp_path / "a" / "b") == pictures.make_folder(str(tmp_path / "a" / "b"))
    (tmp_path / "file").touch()
    for name, got in (("file", "a file of that name"), ("file/x", "Not a directory")):
        with pytest.raises(OSError, match=f"expected a folder to write to at .*{name}, got {got}"):
            pictures.make_folder(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="read-only"):
        pictures.make_folder(tmp_path / "a")


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing_or_the_old_file(tmp_path, monkeypatch, stage):
    pictures.write_bytes(tmp_path / "old.png", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, stage, full)
    for name in ("old.png", "new.png"):
        with pytest.raises(OSError, match=f"expected to write .*{name}, got No space left.*make room"):
            pictures.write_image(tmp_path / name, torch.zeros(3, 4, 4))
    assert [p.name for p in tmp_path.iterdir()] == ["old.png"] and (tmp_path / "old.png").read_bytes() == b"old"


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    seen = []
    replace = os.replace

    def spy(source, target):
        seen.append((os.path.exists(target), os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    pictures.write_bytes(tmp_path / "a.bin", bytes(1000))
    assert seen == [(False, 1000)]


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
