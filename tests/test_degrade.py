"""The degradation, y = [ (x * k) down + n ]_JPEG up: each step and the whole of it against loops in plain numpy."""

import dataclasses
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import degrade
from plumbing import presets
from plumbing.pictures import to_uint8, write_image

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"
CLEAR = degrade.Params(  # changes nothing: a kernel of one pixel, no resampling, no noise, best JPEG
    kernel_size=3, sigma_x=0.05, sigma_y=0.05, theta=0.0, down=1.0, noise=0.0, noise_seed=0, jpeg=100
)  # fmt: skip


def call(*args):
    """The exit code of `python degrade.py args`, in this process."""
    return degrade.main(degrade.parse_args([str(a) for a in args]))


def picture(h=24, w=20, seed=0):
    """Smooth colours with an edge, 8-bit values / 255."""
    y, x = np.mgrid[:h, :w] / max(h, w)
    p = np.random.default_rng(seed).uniform(0, 6, (3, 3))
    v = np.stack([0.5 + 0.4 * np.sin(a * 2 * x + b * 3 * y + c) * (x > 0.3) for a, b, c in p])
    return torch.from_numpy(np.round(v * 255).astype(np.float32) / 255)


def reflect_101(i, n):
    """dcb|abcd|cba, as often as it takes."""
    while not 0 <= i < n:
        i = -i if i < 0 else 2 * (n - 1) - i
    return i


def correlate(x, kernel):
    """Brute force: out(y, x) = sum of kernel(j, i) x(y + j - r, x + i - r)."""
    out, r = np.zeros_like(x), kernel.shape[0] // 2
    _, h, w = x.shape
    rows = [[reflect_101(y + j, h) for j in range(-r, r + 1)] for y in range(h)]
    cols = [[reflect_101(c + j, w) for j in range(-r, r + 1)] for c in range(w)]
    for y in range(h):
        for c in range(w):
            out[:, y, c] = (x[:, rows[y]][:, :, cols[c]] * kernel).sum((1, 2))
    return out


def opencv_bilinear(x, size):
    """OpenCV's INTER_LINEAR, a pixel at a time: source = (target + 0.5) h / H - 0.5, held at the borders."""
    _, h, w = x.shape
    out = np.zeros((3, *size))
    for y in range(size[0]):
        for c in range(size[1]):
            v, u = (y + 0.5) * h / size[0] - 0.5, (c + 0.5) * w / size[1] - 0.5
            j, i = math.floor(v), math.floor(u)
            for dj, wj in ((0, 1 - (v - j)), (1, v - j)):
                for di, wi in ((0, 1 - (u - i)), (1, u - i)):
                    out[:, y, c] += wj * wi * x[:, min(max(j + dj, 0), h - 1), min(max(i + di, 0), w - 1)]
    return out


def pillow_jpeg(x, quality):
    f = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0))).save(f, "JPEG", quality=quality)
    return np.asarray(Image.open(f)).transpose(2, 0, 1)


def test_kernels_equal_the_reference():
    with safe_open(GOLDEN / "degrade_gaussian_kernels.safetensors", "pt") as f:
        cases = json.loads(f.metadata()["metadata"])["kernels"]
        for case in cases:
            sigma = [case.get(key, case.get("sigma")) for key in ("sigma_x", "sigma_y")]
            ours = degrade.gaussian_kernel(case["kernel_size"], *sigma, case.get("theta", 0.0))
            assert ours.dtype == torch.float64 and (ours - f.get_tensor(case["name"])).abs().max() < 1e-7, case
            assert abs(ours.double().sum().item() - 1) < 1e-6
    assert len(cases) == 13


def test_kernel_lies_along_theta():
    k = degrade.gaussian_kernel(21, 6, 1, math.pi / 4)  # theta from x to y, downwards: long along row = column
    assert k[15, 15] > 100 * k[5, 15]
    assert degrade.gaussian_kernel(21, 6, 1, 0.0)[10, 16] > 100 * degrade.gaussian_kernel(21, 6, 1, 0.0)[16, 10]
    for bad in ((20, 1, 1), (21, 0, 1), (21, 1, -1)):
        with pytest.raises(ValueError, match="expected"):
            degrade.gaussian_kernel(*bad, 0.0)


@pytest.mark.parametrize("h, w, size", [(16, 11, 7), (9, 14, 13), (6, 5, 21)])  # the last reaches over more than once
def test_blur_is_correlation_with_reflect_101_borders(h, w, size):
    rng = np.random.default_rng(0)
    x, kernel = rng.uniform(0, 255, (3, h, w)), rng.uniform(0, 1, (size, size))  # not symmetric: no convolution
    assert np.abs(degrade.blur(x, kernel) - correlate(x, kernel)).max() < 1e-9 * kernel.sum() * 255


@pytest.mark.parametrize("size", [(5, 3), (12, 9), (24, 18), (31, 50), (1, 1)])
def test_bilinear_has_the_convention_of_opencv(size):
    x = np.random.default_rng(0).uniform(0, 255, (3, 12, 9))
    assert np.abs(degrade.bilinear(x, size) - opencv_bilinear(x, size)).max() < 1e-10
    assert np.array_equal(degrade.bilinear(x, (12, 9)), x)


def test_bilinear_by_hand():
    x = np.array([[[0.0, 4.0]]] * 3)
    assert degrade.bilinear(x, (1, 4))[0].tolist() == [[0, 1, 3, 4]]
    assert degrade.bilinear(x, (2, 1))[0].tolist() == [[2], [2]]
    assert degrade.bilinear(np.array([[[1.0, 9, 9, 3]]] * 3), (1, 2))[0].tolist() == [[5, 6]]  # no antialiasing
    assert degrade.bilinear(np.ones((3, 1, 1)), (3, 2)).tolist() == np.ones((3, 3, 2)).tolist()


@pytest.mark.parametrize("quality", [30, 75, 100])
def test_jpeg_is_the_round_trip_of_pillow(quality):
    x = picture(33, 47)
    y = degrade.apply(x, dataclasses.replace(CLEAR, jpeg=quality))
    assert np.array_equal(to_uint8(y).numpy(), pillow_jpeg(to_uint8(x).numpy(), quality))


@pytest.mark.parametrize("noise", [5.0, 10.0, 20.0])
def test_noise_has_its_standard_deviation_in_grey_levels(noise):
    y = degrade.apply(torch.full((3, 256, 256), 0.5), dataclasses.replace(CLEAR, noise=noise)).double() * 255
    luma = 0.299 * y[0] + 0.587 * y[1] + 0.114 * y[2]  # chroma is halved in resolution by the JPEG
    expected = noise * math.sqrt(0.299**2 + 0.587**2 + 0.114**2)
    assert abs(luma.std().item() / expected - 1) < 0.05 and abs(luma.mean().item() - 127.5) < 0.2
    assert abs(torch.corrcoef(luma[:, :2].T)[0, 1]) < 0.2


@pytest.mark.parametrize("down", [0.8, 1.7, 3.0])
@pytest.mark.parametrize("gray", [False, True])
def test_the_whole_formula_in_its_order(down, gray):
    params = degrade.Params(7, 1.5, 0.6, 0.4, down, noise=8.0, noise_seed=5, jpeg=60, gray=gray)
    x = picture().numpy().astype(np.float64) * 255
    kernel = np.zeros((7, 7))
    rotation = np.array([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]])
    precision = np.linalg.inv(rotation @ np.diag([1.5**2, 0.6**2]) @ rotation.T)
    for j in range(7):
        for i in range(7):
            d = np.array([i - 3, j - 3])
            kernel[j, i] = math.exp(-0.5 * d @ precision @ d)
    y = correlate(x, kernel / kernel.sum())
    y = opencv_bilinear(y, (int(24 / down), int(20 / down)))
    y = y + np.random.Generator(np.random.PCG64(5)).standard_normal(y.shape) * 8
    y = pillow_jpeg(np.round(y).clip(0, 255).astype(np.uint8), 60)
    y = opencv_bilinear(y.astype(np.float64), (24, 20))
    y = np.stack([0.299 * y[0] + 0.587 * y[1] + 0.114 * y[2]] * 3) if gray else y
    assert np.array_equal(to_uint8(degrade.apply(picture(), params)).numpy(), np.round(np.round(y, 9)).astype(np.uint8))


def test_result_is_8_bit_and_of_the_same_size():
    for h, w in ((24, 20), (1, 1), (3, 40)):
        y = degrade.apply(picture(h, w), degrade.sample(np.random.default_rng(0), size=512))
        assert y.shape == (3, h, w) and y.dtype == torch.float32 and torch.equal(to_uint8(y) / 255, y)
    with pytest.raises(ValueError, match="one by one"):
        degrade.apply(torch.zeros(1, 3, 8, 8), CLEAR)


def test_same_seed_same_bytes_whatever_the_threads():
    x, before = picture(128, 128), torch.get_num_threads()
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rng = np.random.default_rng(3)
        ranges = ("difface", "difface", "realesrgan", "realesrgan")
        made.append([degrade.apply(x, degrade.sample(rng, name, size=128)) for name in ranges])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    assert not torch.equal(made[0][0], made[0][1])


def test_drawn_parameters_and_pixels_stay_what_they_were():
    """Numbers kept when this was written: caches and checkpoints name a seed, so the draws must not move."""
    golden = json.loads((GOLDEN / "degrade_samples.json").read_text())
    for case in golden:
        params = degrade.sample(np.random.default_rng(case["seed"]), case["ranges"], case["size"])
        assert params.before is None  # no such key in caches that were made without Real-ESRGAN's two passes
        for key, value in case["params"].items():
            assert getattr(params, key) == pytest.approx(value, rel=1e-12), key
        y = to_uint8(degrade.apply(picture(32, 32), degrade.Params(**case["params"]))).numpy()
        assert y[:, ::8, ::8].tolist() == case["pixels"]


def test_values_near_a_half_round_alike():
    near = np.array([0.5, 1.5, 2.5, 254.5])
    for error in (-1e-12, 0, 1e-12):
        assert degrade._round8(near + error).tolist() == [0, 2, 2, 254]


def test_difface_ranges_are_those_of_the_teacher():
    r = degrade.RANGES["difface"]
    assert (r.kernel, r.isotropic, r.blur, r.down) == (41, 0.5, (0.1, 15), (0.8, 32))
    assert (r.noise, r.jpeg, r.gray) == ((0, 20), (30, 100), 0.01)
    assert tuple(degrade.RANGES) == presets.RANGES and tuple(degrade.LEVELS) == presets.LEVELS


@pytest.mark.parametrize("name", [name for name in presets.RANGES if name != "realesrgan"])
def test_draws_fill_their_ranges(name):
    r, rng = degrade.RANGES[name], np.random.default_rng(0)
    drawn = [degrade.sample(rng, name) for _ in range(4000)]
    for values, (low, high) in (
        ([p.sigma_x for p in drawn], r.blur),
        ([p.sigma_y for p in drawn], r.blur),
        ([p.down for p in drawn], r.down),
        ([p.noise for p in drawn], r.noise),
        ([p.jpeg for p in drawn], r.jpeg),
        ([p.theta for p in drawn if p.theta], (-math.pi, math.pi)),
    ):
        assert low <= min(values) and max(values) <= high and max(values) - min(values) > 0.97 * (high - low)
        assert abs((np.mean(values) - low) / (high - low) - 0.5) < 0.03
    assert abs(np.mean([p.sigma_x == p.sigma_y for p in drawn]) - 0.5) < 0.03
    assert abs(np.mean([p.gray for p in drawn]) - r.gray) < 0.006
    assert len({p.noise_seed for p in drawn}) > 3990


def test_realesrgan_draws_are_those_of_its_options():
    """options/train_realesrnet_x4plus.yml: [up, down, keep], the scale's range and what it counts from, each pass."""
    rng = np.random.default_rng(0)
    second = [degrade.sample(rng, "realesrgan") for _ in range(4000)]
    first = [p.before for p in second]
    for drawn, base, probabilities, (low, high), sigma, noise in (
        (first, 1, (0.2, 0.7, 0.1), (0.15, 1.5), (0.2, 3), (1, 30)),
        (second, 4, (0.3, 0.4, 0.3), (0.3, 1.2), (0.2, 1.5), (1, 25)),
    ):
        scales = np.array([base / p.down for p in drawn])
        keep = np.isclose(scales, 1)
        shares = np.array([(scales[~keep] > 1).sum(), (scales[~keep] < 1).sum(), keep.sum()]) / 4000
        assert np.abs(shares - probabilities).max() < 0.03
        assert low <= scales.min() < low + 0.01 and abs(scales[scales < 1 - 1e-9].mean() - (low + 1) / 2) < 0.02
        assert high - 0.01 < scales.max() <= high + 1e-9
        for values, (least, most) in (([p.sigma_x for p in drawn], sigma), ([p.noise for p in drawn], noise),
                                      ([p.jpeg for p in drawn], (30, 95))):  # fmt: skip
            assert (
                least <= min(values) and max(values) <= most and abs(np.mean(values) - (least + most) / 2) < 0.03 * most
            )
        assert abs(np.mean([p.sigma_x == p.sigma_y for p in drawn]) - 0.45 / 0.7) < 0.03
        sizes = np.array([p.kernel_size for p in drawn])
        assert abs((sizes == 1).mean() - (0.2 if base == 4 else 0)) < 0.02  # second_blur_prob 0.8
        assert set(sizes[sizes > 1]) == set(range(7, 22, 2)) and abs(sizes[sizes > 1].mean() - 14) < 0.3
    assert all(p.before is None and not p.gray for p in first)
    half = [degrade.sample(np.random.default_rng(3), "realesrgan", size) for size in (512, 256)]
    for p, q in (half, [p.before for p in half]):
        assert (
            q.sigma_x == p.sigma_x / 2
            and q.down == max(p.down / 2, min(p.down, 0.8))
            and (q.noise, q.jpeg) == (p.noise, p.jpeg)
        )


def test_two_passes_are_one_after_the_other():
    first = degrade.Params(3, 0.8, 0.8, 0.0, 1.5, noise=5.0, noise_seed=1, jpeg=50)
    second = degrade.Params(1, 1.0, 1.0, 0.0, 3.0, noise=0.0, noise_seed=2, jpeg=70, before=first)
    *_, y = degrade.one_pass(picture().numpy().astype(np.float64) * 255, first, (24, 20))
    assert y.shape == (3, 16, 13)
    # a kernel of 1 px blurs nothing
    y = pillow_jpeg(np.round(np.round(opencv_bilinear(y, (8, 6)), 9)).astype(np.uint8), 70)
    y = np.round(np.round(opencv_bilinear(y.astype(np.float64), (24, 20)), 9))
    assert np.array_equal(to_uint8(degrade.apply(picture(), second)).numpy(), y)


def test_spatial_ranges_scale_with_the_size():
    for seed in range(50):
        big, small = (degrade.sample(np.random.default_rng(seed), "codeformer-large", size) for size in (512, 128))
        assert (big.kernel_size, small.kernel_size) == (41, 11)
        assert (small.sigma_x, small.sigma_y) == pytest.approx((big.sigma_x / 4, big.sigma_y / 4))
        assert small.down == pytest.approx(big.down / 4)
        assert (small.theta, small.noise, small.jpeg, small.noise_seed) == (
            big.theta,
            big.noise,
            big.jpeg,
            big.noise_seed,
        )
    down = [degrade.sample(np.random.default_rng(seed), "difface", 128).down for seed in range(500)]
    assert 0.8 <= min(down) < 0.9 and 7.8 < max(down) <= 8  # 0.8 / 4 would only enlarge a small picture fivefold
    assert all(degrade.sample(np.random.default_rng(0), size=s).kernel_size % 2 == 1 for s in range(16, 1100, 37))


def test_levels_are_fixed_scaled_and_ordered():
    x = torch.from_numpy(np.asarray(Image.open(ROOT / "samples/clean/hopper.png").convert("RGB")) / 255.0)
    x = x.permute(2, 0, 1).float()
    errors = [(degrade.apply(x, degrade.level(name)) - x).square().mean() for name in presets.LEVELS]
    assert errors[0] < errors[1] < errors[2]
    small = degrade.level("medium", size=128, seed=4)
    assert dataclasses.asdict(small) == dataclasses.asdict(
        degrade.Params(11, sigma_x=1, sigma_y=1, theta=0, down=1.5, noise=8, noise_seed=4, jpeg=60)
    )


def test_gray_samples_are_gray_and_so_is_their_target():
    x = picture()
    y = degrade.apply(x, dataclasses.replace(CLEAR, gray=True))
    assert torch.equal(y[0], y[1]) and torch.equal(y[1], y[2])
    theirs = np.asarray(Image.fromarray(to_uint8(x).permute(1, 2, 0).numpy()).convert("L"))
    gray = degrade.to_gray(torch.stack([x, x]))
    assert gray.shape == (2, 3, 24, 20) and np.abs(to_uint8(gray)[1, 2].numpy().astype(int) - theirs).max() <= 1


def test_parameters_survive_json():
    for ranges in presets.RANGES:
        params = degrade.sample(np.random.default_rng(1), ranges)
        assert degrade.Params(**json.loads(json.dumps(dataclasses.asdict(params)))) == params


def test_a_training_picture_costs_milliseconds():
    x, rng = picture(128, 128), np.random.default_rng(0)
    times = []
    for _ in range(20):
        start = time.process_time()
        degrade.apply(x, degrade.sample(rng, size=128))
        times.append(time.process_time() - start)
    assert np.median(times) < 0.03  # about 0.005 on a quiet machine


def test_command_names_the_broken_picture_and_makes_the_others(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "good.png", picture(40, 32))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    assert call(tmp_path / "in", "-o", tmp_path / "out", "--size", "32") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "broken.jpg" in error
    assert Image.open(tmp_path / "out" / "good.png").size == (32, 32)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]


def test_command_draws_other_degradations_than_training(tmp_path, capsys):
    write_image(tmp_path / "a.png", picture(32, 32))
    assert call(tmp_path / "a.png", "-o", tmp_path / "out") == 0
    said = capsys.readouterr().out
    for stream in ((0, 0), (0, 0, 0), (0, 0, 1)):
        assert str(degrade.sample(np.random.default_rng(stream), size=32)) not in said
    assert str(degrade.sample(np.random.default_rng((0, 0, degrade.EVALUATION)), size=32)) in said


def test_command_says_in_one_line_what_is_in_the_way(tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "a.png", picture())
    (tmp_path / "file").touch()
    assert call(tmp_path / "a.png", "-o", tmp_path / "file") == 1
    error = capsys.readouterr().err
    assert "expected a folder to write to at" in error and "got a file of that name" in error and error.count("\n") == 1

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(degrade, "apply", full)
    assert call(tmp_path / "a.png", "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "enough memory for" in error and "a.png" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_does_not_write_over_its_input(tmp_path, capsys):
    write_image(tmp_path / "a.png", picture())
    before = (tmp_path / "a.png").read_bytes()
    assert call(tmp_path, "-o", tmp_path) == 1
    assert "a.png, itself an input" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before


def test_command_keeps_the_tree_and_names_what_would_be_one_file(tmp_path, capsys):
    for name in ("in/id1/001.png", "in/id2/001.PNG"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_image(tmp_path / name, picture(32, 32))
    assert call(tmp_path / "in", "-o", tmp_path / "out") == 0
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    assert call(tmp_path / "in", "-o", tmp_path / "again") == 1  # named, and the others are made
    for out in ("out", "again"):
        assert sorted(p.relative_to(tmp_path / out).as_posix() for p in (tmp_path / out).rglob("*.png")) == [
            "id1/001.png", "id2/001.png"
        ]  # fmt: skip
    assert "loop.png" in capsys.readouterr().err
    assert call(tmp_path / "in/id1/001.png", tmp_path / "in/id2/001.PNG", "-o", tmp_path / "flat") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "id1/001.png and" in error and "id2/001.PNG: rename one" in error
    assert [p.name for p in (tmp_path / "flat").iterdir()] == ["001.png"]


def test_command_names_each_input_that_is_none(tmp_path, capsys):
    assert call(tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "a.png" in error and "b.png" in error


@pytest.mark.parametrize(
    "arguments", [["x.png"], ["x.png", "-o", "o", "--level", "mild"], ["x", "-o", "o", "--size", "0"]]
)
def test_wrong_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        degrade.parse_args(arguments)
    assert e.value.code == 2
