"""The offline pass: what is in a shard, interruptions at any moment, processes, refusals, checking and reading.

Most tests run the whole of cache.py with small stand-ins for the networks; those of the tiny preset come last. By hand:
`python tests/test_cache.py kill DATA OUT WHOLE 50` kills fifty runs one after the other (WHOLE: a finished one of them).
"""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # by hand, see above
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"
    student, published = map(types.ModuleType, ("student", "plumbing.published"))  # they take seconds to import
    student.encode = lambda vae, x: vae.config.scaling_factor * vae.encode(2 * x - 1).latent_dist.mode()
    student.decode = published.load_vae = None
    sys.modules |= {"student": student, "plumbing.published": published}

import numpy as np
import pytest
import torch
from conftest import begin_process, torchruns_variables
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import cache
import degrade
import teacher
from plumbing import commands, devices, offline, pictures
from plumbing.presets import PRESETS

SIZE = 64


class PixelVAE(torch.nn.Module):
    """A lossless stand-in for the VAE: 8 x 8 pixels become 192 channels, times a gain, through diffusers' interface."""

    def __init__(self):
        super().__init__()
        self.gain, self.config = torch.nn.Parameter(torch.tensor(1.5)), types.SimpleNamespace(scaling_factor=0.5)

    def encode(self, x):
        z = torch.nn.functional.pixel_unshuffle(x, 8) * self.gain
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mode=lambda: z))

    def decode(self, z):
        return types.SimpleNamespace(sample=torch.nn.functional.pixel_shuffle(z / self.gain, 8))


def stand_ins(preset="tiny", device="cpu"):
    """In place of cache.load_networks: a small PMRF whose velocity is not zero, a VAE, 64 px."""
    random_state = torch.get_rng_state()
    torch.manual_seed(0)
    hdit = teacher.HDiT(3, 3, 4, [32, 64], [1, 1], [7, None], 16, 32, 1)
    pmrf = teacher.PMRF(teacher.SwinIR(24, [2], [2]), hdit).eval().requires_grad_(False)
    for p in pmrf.parameters():
        p.add_(torch.randn_like(p) * 0.02)
    torch.set_rng_state(random_state)
    return pmrf, PixelVAE().requires_grad_(False), SIZE


def fill(folder, n=6):
    """n pictures of several sizes and kinds; the same in every run."""
    for k in range(n):
        y, x = np.mgrid[: 70 + 9 * k, : 90 - 4 * k] / 80
        a, b, c = np.random.default_rng(k).uniform(1, 9, (3, 3, 1, 1))
        path = folder / "deeper" / f"{k}.png" if k % 3 == 2 else folder / f"{k}.{('png', 'jpg', 'webp')[k % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_image(path, torch.from_numpy(0.5 + 0.4 * np.sin(a * x + b * y * y + c)))
    return folder


def command(data, out, *more):
    return ["--data", str(data), "--out", str(out), "--steps", "2", "--batch", "2", "--device", "cpu", *more]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished cache of six pictures, twice degraded, made without interruption: (folder, pictures, stdout)."""
    base = tmp_path_factory.mktemp("whole")
    run(fill(base / "data"), base / "cache", "--repeats", "2")
    return base / "cache", base / "data"


def run(data, out, *more):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(cache, "load_networks", stand_ins)
        return cache.work(cache.parse_args(command(data, out, *more)))


# ------------------------------------------------------------------------------------------------------------ contents


def test_sec32_sample_is_degraded_picture_teacher_and_space_bridge(whole):
    from student import encode

    folder, data = whole
    dataset, (pmrf, vae, _) = cache.CacheDataset(folder), stand_ins()
    assert len(dataset) == 12 == dataset.meta["count"]
    pairs = [dataset[6]["y"], dataset[7]["y"]], [dataset.record(6)["seed"], dataset.record(7)["seed"]]
    x_hat = pmrf.restore(torch.stack(pairs[0]), steps=2, seed=pairs[1])  # Eq. 4-5
    for i in (6, 7):
        sample, record = dataset[i], dataset.record(i)
        assert sample["index"] == i and sample["z_lq"].shape == (192, 8, 8) and sample["z_lq"].dtype == torch.float32
        hq = pictures.to_uint8(pictures.square(pictures.read_image(data / record["source"]), SIZE)) / 255
        y = degrade.apply(hq, degrade.Params(**record["params"]))
        assert torch.equal(sample["y"], y)
        assert (sample["x_target"] - x_hat[i - 6]).abs().max() < 0.502 / 255
        assert torch.equal(pictures.to_uint8(sample["x_target"]) / 255, sample["x_target"])
        for z, x in (("z_lq", "y"), ("z_target", "x_target")):  # the latents are those of the stored pictures
            assert torch.equal(sample[z], encode(vae, sample[x][None])[0].half().float())
        assert record["sha256"] == hashlib.sha256((data / record["source"]).read_bytes()).hexdigest()
    with pytest.raises(IndexError):
        dataset[12]


def test_several_ranges_take_turns_over_the_repeats(tmp_path):
    """Repeat 0 from difface, 1 from gfpgan: its quality is 60 or more, and half of difface's is below that."""
    out = tmp_path / "cache"
    run(fill(tmp_path / "data"), out, "--repeats", "2", "--ranges", "difface", "gfpgan")
    dataset = cache.CacheDataset(out)
    assert [r["name"] for r in dataset.meta["ranges"]] == ["difface", "gfpgan"]
    for i in range(12):
        record = dataset.record(i)
        rng = np.random.Generator(np.random.PCG64((0, i % 6, i // 6)))
        assert record["params"] == vars(degrade.sample(rng, ("difface", "gfpgan")[i // 6], SIZE))
    assert min(dataset.record(i)["params"]["jpeg"] for i in range(6)) < 60
    assert min(dataset.record(i)["params"]["jpeg"] for i in range(6, 12)) >= 60
    with pytest.raises(SystemExit):
        cache.parse_args(["--data", "x", "--ranges", "difface", "gfpgan"])


def test_shards_open_without_this_code(whole):
    with safe_open(whole[0] / "shard_00000.safetensors", "pt") as f:
        assert f.get_tensor("z_lq").dtype == f.get_tensor("z_target").dtype == torch.float16
        start, end = f.get_tensor("x_offsets")[:2].tolist()
        assert bytes(f.get_tensor("x_bytes")[start:end].tolist())[8:12] == b"WEBP"
        assert json.loads(f.metadata()["records"])["samples"][0]["source"] == "0.png"


def test_meta_tells_how_it_was_made_and_nothing_of_where(whole):
    meta = cache.CacheDataset(whole[0]).meta
    expected = dict(preset="tiny", seed=0, steps=2, sigma_s=0.1, image_size=SIZE, repeats=2, pictures=6, skipped=[])
    assert {key: meta[key] for key in expected} == expected
    assert [r["name"] for r in meta["ranges"]] == ["difface"] and meta["ranges"][0]["blur"] == [0.1, 15]
    assert meta["versions"]["torch"] == torch.__version__ and set(meta["versions"]) >= {"numpy", "pillow"}
    for shard in meta["shards"]:
        data = (whole[0] / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    for name, data in contents(whole[0]).items():
        assert str(whole[1].parent).encode() not in data, name


def test_each_sample_depends_on_seed_index_and_repeat_alone(whole, tmp_path):
    run(whole[1], tmp_path / "c", "--limit", "3", "--batch", "3")  # other neighbours in the batch
    few, all_ = cache.CacheDataset(tmp_path / "c"), cache.CacheDataset(whole[0])
    for i in range(3):
        assert few.record(i) == all_.record(i) and torch.equal(few[i]["y"], all_[i]["y"])
        assert (few[i]["x_target"] - all_[i]["x_target"]).abs().max() < 1.5 / 255
    drawn = [all_.record(i)["params"] for i in range(12)]
    assert len({json.dumps(p) for p in drawn}) == 12 and all_.record(0)["source"] == all_.record(6)["source"]
    run(whole[1], tmp_path / "other", "--limit", "3", "--seed", "1")
    assert cache.CacheDataset(tmp_path / "other").record(0)["params"] != drawn[0]


def test_preview_shows_lq_teacher_and_hq(whole):
    sheet = pictures.read_image(whole[0] / "preview.png")
    assert sheet.shape == (3, 20 + 8 * 256, 3 * 256)
    sample, hq = cache.CacheDataset(whole[0])[1], pictures.read_image(whole[1] / "1.jpg")
    for column, x in enumerate((sample["y"], sample["x_target"], pictures.square(hq, 256))):
        shown = sheet[:, 20 + 256 : 20 + 512, 256 * column :][..., :256]
        assert (shown - pictures.resize(x, (256, 256))).abs().max() < 0.6 / 255


# ------------------------------------------------------------------------------------------- the same bytes, in any case


@pytest.mark.parametrize("threads, workers", [(1, 1), (2, 3)])
def test_threads_do_not_show(whole, tmp_path, threads, workers, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(workers), raising=False)
    run(whole[1], tmp_path / "c", "--repeats", "2")
    assert torch.get_num_threads() == threads  # as it was found
    torch.set_num_threads(before)
    assert contents(tmp_path / "c") == contents(whole[0])


def run_in_a_process(arguments, err, environment):
    begin_process(err, environment)
    cache.load_networks, commands.SCRIPT = stand_ins, "cache.py"
    sys.exit(cache.work(cache.parse_args(arguments)))


def test_two_processes_of_torchrun_make_the_cache_of_one(tmp_path, forks):
    data = fill(tmp_path / "data", 8)
    for name in ("3.png", "deeper/5.png", "4.jpg"):  # 3.png and 4.jpg are a whole shard
        (data / name).write_bytes(b"broken")
    assert run(data, tmp_path / "one") == 1
    errs, processes = [tmp_path / "err_0", tmp_path / "err_1"], []
    for err, own in zip(errs, torchruns_variables(2), strict=True):
        arguments = command(data, tmp_path / "two")
        processes.append(forks.Process(target=run_in_a_process, args=(arguments, err, own)))
        processes[-1].start()
    for process, err in zip(processes, errs, strict=True):
        process.join(240)
        assert process.exitcode == (process is processes[0]), err.read_text()  # 1, which torchrun then hands on, and 0
    said = "".join(err.read_text() for err in errs)
    assert said.count(": 5 samples, ") == said.count("3 of 8 pictures skipped") == 1
    assert "cache.py: skipped 3.png" in said
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    dataset = cache.CacheDataset(tmp_path / "one")
    assert [shard["count"] for shard in dataset.meta["shards"]] == [2, 0, 2, 1]
    assert [dataset.record(i)["source"] for i in range(5)] == ["0.png", "1.jpg", "6.png", "7.jpg", "deeper/2.png"]
    assert list(cache.check(tmp_path / "one", dataset.meta, PixelVAE())) == []


def test_each_process_makes_its_share(whole, tmp_path):
    (tmp_path / "c").mkdir()
    settings = (whole[0] / "settings.json").read_bytes()
    (tmp_path / "c" / "settings.json").write_bytes(settings)
    sources = offline.sources_in(whole[1], tmp_path / "c", None)
    for rank, shards in ((1, [1, 3, 5]), (0, [0, 1, 2, 3, 4, 5])):
        pmrf, vae = (devices.prepare(network, "cpu", "fp32") for network in stand_ins()[:2])
        arguments = whole[1], sources, tmp_path / "c", json.loads(settings)
        meta, made, _ = cache.build(pmrf, vae, *arguments, rank=rank, world=2)
        assert [int(p.stem[-5:]) for p in sorted((tmp_path / "c").glob("shard*"))] == shards and made == 6
        assert (meta is None) == (rank == 1)
    assert contents(tmp_path / "c") == contents(whole[0])


def kill_loop(data, out, whole, kills, seed=0):
    """Kills `kills` runs at random moments, then lets one finish; yields what was found after each.

    Each run is a fork of this process, which has imported everything but computed nothing, on a disk that is slow to
    sync. The first one is not killed: it tells how long a run takes. Half of the others are killed in mid-write.
    """
    rng, expected, seconds, fsync = random.Random(seed), contents(whole), None, os.fsync
    os.fsync = lambda handle: (time.sleep(0.04), fsync(handle))
    for attempt in range(kills + 2):
        start = time.perf_counter()
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                os._exit(cache.work(cache.parse_args(command(data, out, "--repeats", "2"))))
            finally:
                os._exit(99)  # after an exception; the child must not go on as its parent
        if 0 < attempt <= kills:
            end, mid_write = start + rng.uniform(0.05, 0.8) * seconds, rng.random() < 0.5
            before = len(list(out.glob(".*.tmp")))
            while time.perf_counter() < end or (mid_write and len(list(out.glob(".*.tmp"))) == before and alive(child)):
                time.sleep(0.005)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = seconds or time.perf_counter() - start
        found = contents(out) if out.exists() else {}
        files = {name: data for name, data in found.items() if not name.endswith(".tmp")}
        wrong = [name for name, data in files.items() if data != expected[name]]  # nothing half-written, ever
        yield attempt, status, time.perf_counter() - start, sorted(files), len(found) - len(files), wrong
        if attempt <= kills and ("meta.json" in found or rng.random() < 0.25):  # from the beginning again
            for path in out.iterdir():
                path.unlink()


def alive(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def kill_in_a_process(err, *arguments):
    begin_process(err, {})
    cache.load_networks = stand_ins
    sys.exit(kill_and_tell(*arguments))


def kill_and_tell(data, out, whole, kills):
    """The loop, a line a run; 1 if something half-written was ever found, or the end is not the unbroken run's."""
    faults = 0
    for attempt, status, seconds, files, leftover, wrong in kill_loop(data, out, whole, kills):
        print(f"{attempt}: exit {status}, {seconds:.2f} s, {len(files)} files, {leftover} unfinished, wrong: {wrong}")
        last = attempt == kills + 1
        faults += len(wrong) + (last and (status != 0 or leftover > 0 or len(files) != len(contents(whole))))
    return 1 if faults else 0


def test_killed_at_any_moment_it_ends_with_the_same_bytes(whole, tmp_path, forks):
    arguments = tmp_path / "said", whole[1], tmp_path / "c", whole[0], 4
    process = forks.Process(target=kill_in_a_process, args=arguments)
    process.start()
    process.join(240)
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    assert contents(tmp_path / "c") == contents(whole[0])


def test_resume_makes_only_what_is_missing(whole, tmp_path):
    (tmp_path / "c").mkdir()
    for name, data in contents(whole[0]).items():
        if name not in ("meta.json", "preview.png", "shard_00003.safetensors"):
            (tmp_path / "c" / name).write_bytes(data)
    (tmp_path / "c" / ".shard_00003.safetensors.77.aa.tmp").write_bytes(b"what a kill left")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("shard*")}
    with pytest.raises(ValueError, match="unfinished"):
        cache.CacheDataset(tmp_path / "c")
    run(whole[1], tmp_path / "c", "--repeats", "2")
    assert contents(tmp_path / "c") == contents(whole[0])
    assert all((tmp_path / "c" / name).stat().st_mtime_ns == t for name, t in before.items())


def test_again_on_a_finished_cache_does_nothing(whole, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # not even where nothing can be written
    before = {p.name: p.stat().st_mtime_ns for p in whole[0].iterdir()}
    assert run(whole[1], whole[0], "--repeats", "2") == 0
    assert "already finished" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in whole[0].iterdir()} == before


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "more, named",
    [
        (["--steps", "3"], r"steps = 2 \(now 3\)"),
        (["--seed", "1"], r"seed = 0 \(now 1\)"),
        (["--ranges", "gfpgan"], "ranges .*gfpgan"),
        (["--limit", "5"], r"pictures = 6 \(now 5\)"),
    ],
)
def test_other_settings_are_refused_by_name(whole, more, named):
    with pytest.raises(ValueError, match=named):
        run(whole[1], whole[0], "--repeats", "2", *more)


def test_other_weights_and_libraries(whole, tmp_path, monkeypatch):
    def retrained(*_):
        pmrf, vae, size = stand_ins()
        next(pmrf.parameters()).mul_(1.001)
        return pmrf, vae, size

    arguments = cache.parse_args(command(whole[1], whole[0], "--repeats", "2"))
    monkeypatch.setattr(cache, "load_networks", retrained)
    with pytest.raises(ValueError, match="teacher_sha256"):
        cache.work(arguments)
    monkeypatch.setattr(cache, "load_networks", stand_ins)
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert cache.work(arguments) == 0  # what is finished stays good
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "settings.json").write_bytes((whole[0] / "settings.json").read_bytes())
    with pytest.raises(ValueError, match="versions .*99.0"):  # a half would be of other bytes
        run(whole[1], tmp_path / "c", "--repeats", "2")


def test_folders_that_will_not_do(whole, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected pictures"):
        run(tmp_path / "empty", tmp_path / "c")
    with pytest.raises(ValueError, match="expected a folder"):
        run(tmp_path / "nowhere", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="new or empty"):
        run(whole[1], tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="none: make one"):
        cache.CacheDataset(tmp_path / "mine")
    with pytest.raises(SystemExit) as e:
        cache.parse_args(["--out", "c"])
    assert e.value.code == 2


def test_the_cache_may_lie_inside_the_data(tmp_path):
    data = fill(tmp_path / "data", 2)
    assert run(data, data / "cache") == 0 and run(data, data / "cache") == 0  # its preview.png is no source
    assert len(cache.CacheDataset(data / "cache")) == 2


def test_broken_pictures_are_named_skipped_and_counted(tmp_path, capsys):
    data = fill(tmp_path / "data", 4)
    (data / "1.jpg").write_bytes((data / "1.jpg").read_bytes()[:300])
    (data / "notes.png").write_text("no picture")
    assert run(data, tmp_path / "c") == 1
    err = capsys.readouterr().err
    assert "skipped 1.jpg" in err and "skipped notes.png" in err and "2 of 5 pictures skipped" in err
    dataset = cache.CacheDataset(tmp_path / "c")
    assert [dataset.record(i)["source"] for i in range(len(dataset))] == ["0.png", "3.png", "deeper/2.png"]
    assert [s["source"] for s in dataset.meta["skipped"]] == ["1.jpg", "notes.png"]
    assert str(tmp_path) not in json.dumps(dataset.meta)
    assert [dataset[i]["index"] for i in range(3)] == [0, 1, 2]  # skipped ones shift the rest
    assert not list(cache.check(tmp_path / "c", dataset.meta, PixelVAE()))
    (data / "0.png").write_text("broken too")
    with pytest.raises(ValueError, match="2 that cannot be read"):
        run(fill_broken(tmp_path / "bad"), tmp_path / "none")


def fill_broken(folder):
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        (folder / name).write_bytes(b"broken")
    return folder


def test_pictures_too_small_to_be_a_training_face_are_named_and_left_out(tmp_path, capsys):
    data = fill(tmp_path / "data", 2)
    pictures.write_image(data / "dot.png", torch.zeros(3, 1, 1))
    pictures.write_image(data / "strip.png", torch.zeros(3, 300, 31))
    pictures.write_image(data / "half.png", torch.rand(3, 32, 300))
    assert run(data, tmp_path / "cache") == 1
    err = capsys.readouterr().err
    assert "skipped dot.png: expected a short side of 32 px or more, got 1x1" in err and "2 of 5" in err
    assert [s["source"] for s in cache.read_meta(tmp_path / "cache")["skipped"]] == ["dot.png", "strip.png"]
    assert run(data, tmp_path / "all", "--min-side", "1") == 0 and cache.read_meta(tmp_path / "all")["count"] == 5
    with pytest.raises(ValueError, match="min_side = 1 .now 32"):
        run(data, tmp_path / "all")


def test_a_cache_that_was_finished_before_a_setting_was_known_stays_good(whole, tmp_path, capsys):
    folder = tmp_path / "cache"
    shutil.copytree(whole[0], folder)
    for name in ("settings.json", "meta.json"):
        old = json.loads((folder / name).read_text())
        del old["min_side"]
        (folder / name).write_text(json.dumps(old))
    assert run(whole[1], folder, "--repeats", "2") == 0 and "nothing to do" in capsys.readouterr().out


def test_links_to_nothing_and_pipes_are_skipped_too(tmp_path):
    data = fill(tmp_path / "data", 2)
    os.mkfifo(data / "pipe.png")
    (data / "link.png").symlink_to(data / "gone.png")
    (data / "loop.png").symlink_to("loop.png")
    assert run(data, tmp_path / "c") == 1
    meta = cache.CacheDataset(tmp_path / "c").meta
    assert meta["count"] == 2 and [s["source"] for s in meta["skipped"]] == ["link.png", "loop.png", "pipe.png"]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("settings.json", "{", "settings of a cache in .*settings.json"),
        ("settings.json", "[1]", "settings of a cache in .*settings.json"),
        ("shard_00002.safetensors", "no shard", "expected a whole shard, got .*shard_00002"),
    ],
)
def test_a_damaged_file_of_an_unfinished_cache_is_named(whole, tmp_path, name, text, said):
    folder, _ = copied(whole, tmp_path / "c")
    (folder / "meta.json").unlink()
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{said}.*delete") as e:
        run(whole[1], folder, "--repeats", "2")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"shards": []}', '{"shards": [], "count": 1, "preset": "tiny", "image_size": 64}']
)
def test_a_foreign_meta_json_is_refused(whole, tmp_path, text):
    folder, _ = copied(whole, tmp_path / "c")
    (folder / "meta.json").write_text(text)
    for use in (lambda: cache.CacheDataset(folder), lambda: cache.work(cache.parse_args(["--check", str(folder)]))):
        with pytest.raises(ValueError, match="foreign meta.json"):
            use()


@pytest.mark.parametrize("writes", [0, 4, 7, 8])  # settings, six shards, the preview, meta.json: one fails
def test_a_full_disk_is_an_error_and_nothing_half_written(whole, tmp_path, monkeypatch, writes):
    fsync, left = os.fsync, [2 * writes]  # each file and then its folder

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(whole[1], tmp_path / "c", "--repeats", "2")
    expected = contents(whole[0])
    found = contents(tmp_path / "c")
    assert len(found) == writes and "meta.json" not in found
    assert all(expected[name] == data for name, data in found.items())
    monkeypatch.undo()
    run(whole[1], tmp_path / "c", "--repeats", "2")
    assert contents(tmp_path / "c") == expected


def test_weights_that_give_nan_stop_it(whole, tmp_path, monkeypatch):
    def broken(*_):
        pmrf, vae, size = stand_ins()
        next(pmrf.parameters()).fill_(float("nan"))
        return pmrf, vae, size

    monkeypatch.setattr(cache, "load_networks", broken)
    with pytest.raises(ValueError, match="expected finite values.*teacher"):
        cache.work(cache.parse_args(command(whole[1], tmp_path / "c")))
    assert not list((tmp_path / "c").glob("shard*"))


# ----------------------------------------------------------------------------------------------------------- checking


def copied(whole, to):
    to.mkdir()
    for name, data in contents(whole[0]).items():
        (to / name).write_bytes(data)
    return to, json.loads((to / "meta.json").read_text())


def test_check_finds_a_flipped_bit(whole, tmp_path):
    folder, meta = copied(whole, tmp_path / "c")
    assert list(cache.check(folder, meta, PixelVAE())) == []
    data = bytearray((folder / "shard_00003.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "shard_00003.safetensors").write_bytes(data)
    faults = list(cache.check(folder, meta, PixelVAE()))
    assert "shard_00003.safetensors: expected the sha256" in faults[0] and all("shard_00003" in f for f in faults)


def test_check_finds_what_a_hash_cannot(whole, tmp_path):
    folder, meta = copied(whole, tmp_path / "c")

    def rewrite(k, change):
        path = folder / f"shard_{k:05d}.safetensors"
        with safe_open(path, "pt") as f:
            tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118
        change(tensors)
        save_file(tensors, path, metadata)
        data = path.read_bytes()
        meta["shards"][k] |= dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    rewrite(0, lambda t: t["z_target"].copy_(t["z_target"].flip(0)))  # two samples mixed up
    rewrite(1, lambda t: t["z_lq"][1, 0].fill_(float("inf")))
    rewrite(2, lambda t: t.update(z_lq=t["z_lq"][:1]))
    rewrite(3, lambda t: t["x_bytes"].zero_())
    rewrite(4, lambda t: t["z_target"][0, 0, 0].fill_(float("nan")))
    (folder / "shard_00005.safetensors").write_bytes(b"no shard")
    faults = list(cache.check(folder, meta, PixelVAE()))
    what = {0: "decodes to X† at 18", 1: "sample 1: expected finite", 2: "expected 2 samples", 3: "cannot be read"}
    what[4] = "sample 0: expected finite"
    for k, text in (what | {5: "cannot be read"}).items():
        assert any(f"shard_{k:05d}" in fault and text in fault for fault in faults), (k, faults)
    assert not any("\n" in fault for fault in faults) and sum("shard_00004" in fault for fault in faults) == 1
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="shard_00005"):
        cache.CacheDataset(folder)


def test_check_finds_pictures_of_another_size_and_parameters_that_are_none(whole, tmp_path):
    folder, meta = copied(whole, tmp_path / "c")
    faults = list(cache.check(folder, meta | {"image_size": 32}, PixelVAE()))
    assert len(faults) == 12 and all(f"expected pictures of 32 px, got (3, {SIZE}, {SIZE})" in f for f in faults)
    path = folder / "shard_00001.safetensors"
    with safe_open(path, "pt") as f:
        tensors, records = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()["records"]  # noqa: SIM118
    save_file(tensors, path, {"records": records.replace("sigma_x", "sigma_z")})
    faults = list(cache.check(folder, meta, PixelVAE()))
    assert "shard_00001" in faults[-1] and "sigma_z" in faults[-1]


def test_check_command(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "load_vae", lambda config: PixelVAE())
    folder, _ = copied(whole, tmp_path / "c")
    arguments = cache.parse_args(["--check", str(folder), "--device", "cpu"])
    assert cache.work(arguments) == 0 and "12 samples in 6 shards" in capsys.readouterr().out
    path = folder / "shard_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert cache.work(arguments) == 1 and "shard_00000" in capsys.readouterr().err
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="unfinished"):
        cache.work(arguments)


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_two_workers_read_what_one_process_reads(whole, context, forks):
    dataset = cache.CacheDataset(whole[0])
    alone = [dataset[i] for i in range(12)]  # the files are open when the workers start
    loader = DataLoader(dataset, batch_size=5, num_workers=2, multiprocessing_context=context)
    seen = 0
    for batch in loader:
        for j, i in enumerate(batch["index"].tolist()):
            assert all(torch.equal(batch[key][j], alone[i][key]) for key in ("z_lq", "z_target", "y", "x_target"))
            seen += 1
    assert seen == 12


def test_one_sample_is_read_without_the_rest_of_its_shard(whole):
    dataset, read = cache.CacheDataset(whole[0]), []

    class Slice:
        def __init__(self, part):
            self.part = part

        def __getitem__(self, key):
            read.append(self.part[key].nbytes)
            return self.part[key]

    dataset[2]  # opens the shard
    ((k, f),) = dataset.files.items()
    dataset.files[k] = types.SimpleNamespace(get_slice=lambda name: Slice(f.get_slice(name)))
    sizes = []
    for i in (2, 3):
        read.clear()
        dataset[i]
        sizes.append(sum(read))
    shard = dataset.meta["shards"][1]["bytes"]
    assert 0.8 * shard < sum(sizes) < shard and max(sizes) < 0.65 * shard  # two samples make up the shard


# ---------------------------------------------------------------------------------------------------- the tiny preset


def test_tiny_preset_end_to_end(tmp_path, capsys):
    data = ROOT / "samples" / "clean"
    arguments = ["--data", str(data), "--out", str(tmp_path / "c"), "--steps", "2", "--device", "cpu"]
    assert cache.work(cache.parse_args(arguments)) == 0
    assert cache.work(cache.parse_args(["--check", str(tmp_path / "c"), "--device", "cpu"])) == 0
    assert "all as they were written" in capsys.readouterr().out
    sample, S = cache.CacheDataset(tmp_path / "c")[0], PRESETS["tiny"]["image_size"]
    assert sample["y"].shape == sample["x_target"].shape == (3, S, S)


if __name__ == "__main__":
    cache.load_networks = stand_ins
    _, _, data, out, finished, kills = sys.argv
    sys.exit(kill_and_tell(Path(data), Path(out), Path(finished), int(kills)))
