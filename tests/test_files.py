"""Finding pictures in folders and writing files: links, kinds that are left out, and writes that fail half-way."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from plumbing import commands, files, pictures


def test_find_images(tmp_path):
    for name in ("b/2.JPG", "b/1.webp", "a.png", "b/notes.txt", ".hidden/3.png", "b/._1.png", "10.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [p.relative_to(tmp_path).as_posix() for p in files.find_images([tmp_path])]
    assert names == ["10.jpeg", "a.png", "b/1.webp", "b/2.JPG"]
    twice = files.find_images([tmp_path / "b" / "2.JPG", tmp_path])
    assert twice[0].name == "2.JPG" and len(twice) == 4
    assert files.find_images(str(tmp_path / "a.png")) == [tmp_path / "a.png"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.find_images([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="notes.txt"):
        files.find_images([tmp_path / "b" / "notes.txt"])


def test_an_unreadable_folder_is_an_error_not_an_empty_one(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match=f"expected a folder that can be read, got {tmp_path}.*leave it out"):
        files.find_images([tmp_path])


def test_what_is_no_file_or_cannot_be_read_is_said(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")  # to open it would be to wait for ever
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(OSError, match=f"expected a file, got .*{name}"):
            pictures.read_image(tmp_path / name)
    assert sorted(p.name for p in files.find_images([tmp_path])) == ["link.png", "pipe.png"]
    with pytest.raises(FileNotFoundError, match="link.png.*does not exist"):
        pictures.read_image(tmp_path / "link.png")

    def refused(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PermissionError, match="expected a file that can be read, got .*a.png"):
        pictures.read_image(tmp_path / "a.png")


def test_a_folder_that_cannot_be_made_or_written_is_said(tmp_path, monkeypatch):
    assert files.make_folder(tmp_path / "a" / "b") == files.make_folder(str(tmp_path / "a" / "b"))
    (tmp_path / "file").touch()
    for name, got in (("file", "a file of that name"), ("file/x", "Not a directory")):
        with pytest.raises(OSError, match=f"expected a folder to write to at .*{name}, got {got}"):
            files.make_folder(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="read-only"):
        files.make_folder(tmp_path / "a")


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing_or_the_old_file(tmp_path, monkeypatch, stage):
    files.write_bytes(tmp_path / "old.png", b"old")

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
    files.write_bytes(tmp_path / "a.bin", bytes(1000))
    assert seen == [(False, 1000)]


def test_what_a_folder_holds_beside_pictures_is_counted_by_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "READ", (".png", ".tif"))
    monkeypatch.setattr(files, "NEEDS", {".heic": "for .heic and .heif: pip install pillow-heif"})
    for name in ("a.png", "b.tif", "c.HEIC", "d/e.heic", "f.txt", "Makefile", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in files.find_images(tmp_path)] == ["a.png", "b.tif"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].endswith("pip install pillow-heif")
    assert f"{tmp_path}: left out 4 other files (2 .heic, 1 .txt, 1 without suffix);" in said[0]
    with pytest.raises(ValueError, match="c.HEIC.*pip install pillow-heif"):
        files.find_images(tmp_path / "c.HEIC")
    monkeypatch.setenv("RANK", "1")  # of torchrun's processes the first one speaks
    files.find_images(tmp_path)
    assert not capsys.readouterr().err


def test_links_to_folders_are_followed_once_each_and_loops_are_named(tmp_path, capsys):
    for name in ("tree/z/1.png", "elsewhere/deep/2.png", "elsewhere/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {"tree/a": "z", "tree/b": tmp_path / "elsewhere", "tree/c": tmp_path / "elsewhere/deep", "tree/z/up": ".."}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "tree")
    (tmp_path / "tree/1.png").symlink_to("z/1.png")
    (tmp_path / "tree/loop.png").symlink_to("loop.png")
    found = [p.relative_to(tmp_path / "tree").as_posix() for p in files.find_images(tmp_path / "tree")]
    assert found == ["1.png", "b/3.png", "b/deep/2.png", "loop.png"]
    assert capsys.readouterr().err.splitlines() == [
        f"{commands.SCRIPT}: {tmp_path}/tree/z/up leads back to a folder that holds it: not followed"
    ]
    with pytest.raises(OSError, match="expected a file that can be read, got .*loop.png.*symbolic links"):
        files.read_file(tmp_path / "tree/loop.png")


def test_names_that_differ_in_case_or_in_how_letters_are_composed_are_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert files.same_name(tmp_path / "A.png") == files.same_name(tmp_path / "link/a.PNG")
    assert files.same_name(tmp_path / "\u00e9.png") == files.same_name(tmp_path / "E\u0301.png")
    assert files.same_name(tmp_path / "loop.png") != files.same_name(tmp_path / "a.png")


@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP", "EBADF"])
def test_a_file_system_that_flushes_no_folder_is_no_fault(tmp_path, monkeypatch, code):
    fsync, folders = os.fsync, []

    def refuses_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            folders.append(handle)
            raise OSError(getattr(errno, code), "no")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    files.write_bytes(tmp_path / "a.bin", b"a")
    assert folders and (tmp_path / "a.bin").read_bytes() == b"a"

    def refuses(handle):
        raise OSError(getattr(errno, code), "no")

    monkeypatch.setattr(os, "fsync", refuses)
    with pytest.raises(OSError):
        files.sync(tmp_path / "a.bin")


def test_a_name_as_long_as_names_can_be_is_written(tmp_path):
    name = "\u8138" * 83 + ".png"  # 253 bytes; 255 is the limit
    pictures.write_image(tmp_path / name, torch.zeros(3, 4, 4))
    assert [p.name for p in tmp_path.iterdir()] == [name]
