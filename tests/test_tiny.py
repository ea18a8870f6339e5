"""The embedded model: its autoencoder against numpy, its size, and the README's chain on the sample portraits."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cache
import restore
import student
import teacher
import train
from nets.autoencoder import PCAAutoencoder
from plumbing.pictures import read_image, square, to_uint8
from plumbing.presets import load_config
from plumbing.runs import steps_in
from tiny import fit, pool, pretrain
from tiny.axes import half_whitened, in_pixels, learn_in_axes
from tiny.pool import SIZE, VIEWS, Pool, make_pair

ROOT = Path(__file__).resolve().parent.parent


def test_autoencoder_starts_as_the_principal_components_of_patches():
    """Before any training decode(encode(x)) is the rank-C reconstruction that numpy's SVD gives."""
    x = 2 * torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    vae = PCAAutoencoder(latent_channels=5)
    vae.set_components(*half_whitened(pretrain.patches(x), 5))
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()
        x_hat = vae.decode(z).sample
    patches = x.reshape(6, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).numpy().astype(np.float64)
    mean = patches.mean(0)
    u, s, v = np.linalg.svd(patches - mean, full_matrices=False)
    rank5 = (u[:, :5] * s[:5]) @ v[:5] + mean
    ours = x_hat.reshape(6, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).numpy()
    assert np.abs(ours - rank5).max() < 1e-4
    assert z.shape == (6, 5, 4, 4)
    assert z.permute(1, 0, 2, 3).reshape(5, -1).mean(1).abs().max() < 1e-4  # each channel is centred
    std = z.permute(1, 0, 2, 3).reshape(5, -1).std(1).numpy()
    component = s[:5] / np.sqrt(len(patches) - 1)
    assert std == pytest.approx(np.sqrt(component) / np.sqrt(component.mean()), rel=1e-3)  # half-way to whitening


def test_autoencoder_has_no_randomness():
    vae = PCAAutoencoder(latent_channels=5)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        d = vae.encode(x).latent_dist
        assert torch.equal(d.mode(), d.sample())


def test_layers_learn_in_axes_and_are_saved_in_pixels():
    """A step of Adam moves every coordinate alike, not every pixel; what comes back computes the same without the axes."""
    torch.manual_seed(0)
    patches = torch.randn(200, 12) * torch.logspace(1, -2, 12) @ torch.linalg.qr(torch.randn(12, 12))[0]
    mean, down, up = half_whitened(patches)
    assert (up @ down - torch.eye(12)).abs().max() < 1e-9
    flat = half_whitened(patches[:, :4].repeat(1, 3))  # 4 of 12 axes vary
    assert all(torch.isfinite(a).all() for a in flat) and (flat[2] @ flat[1] - torch.eye(12)).abs().max() < 1e-9
    plain = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.Linear(5, 12))
    start = [p.detach().clone() for p in plain.parameters()]
    net = copy.deepcopy(plain)
    learn_in_axes(net[0], "weight", down, up, dim=1)
    learn_in_axes(net[1], "weight", up.T, down.T, dim=0)
    learn_in_axes(net[1], "bias", up.T, down.T, dim=0)
    assert torch.allclose(net[0].weight, start[0] @ down.float(), atol=1e-5)  # the start is one in coordinates
    assert torch.allclose(net[1].weight, up.float() @ start[2], atol=1e-5)
    assert torch.allclose(net[1].bias, up.float() @ start[3], atol=1e-5)
    before = (net[0].weight @ up.float()).detach(), (down.float() @ net[1].weight).detach()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    (net(patches) - patches).square().mean().backward()
    optimizer.step()
    moved = (net[0].weight @ up.float() - before[0], down.float() @ net[1].weight - before[1])
    assert all((m.abs() - 1e-3).abs().max() < 1e-4 for m in moved)
    expected = net(patches)
    assert in_pixels(net, plain) is plain and [n for n, _ in plain.named_parameters()] == [
        "0.weight", "0.bias", "1.weight", "1.bias"]  # fmt: skip
    assert torch.allclose(plain(patches), expected, atol=1e-5)


def test_a_clone_stays_quick():
    weights = sum(p.stat().st_size for p in (ROOT / "tiny").rglob("*.safetensors"))
    assert weights <= 60e6
    assert not [p for p in (ROOT / "tiny").rglob("*") if p.suffix in {".pt", ".pth", ".ckpt", ".pkl", ".bin"}]


def test_shipped_settings_name_no_machine():
    files = list((ROOT / "tiny").rglob("*.json"))
    assert len(files) >= 9
    for path in files:
        assert not [v for v in path.read_text().split('"') if v.startswith(("/", "~", "C:"))], path


def test_one_number_says_how_large_pictures_are():
    """No file but the presets names the embedded model's size."""
    size = str(load_config("tiny")["image_size"])
    for path in [*(ROOT / "tiny").glob("*.py"), *(ROOT / "nets").glob("*.py")]:
        pixels = re.findall(rf"\b{size} ?(?:px|x {size})|(?:SIZE|size) ?= ?{size}\b", path.read_text())
        assert not pixels, (path, pixels)


def test_every_part_can_be_rebuilt(tmp_path, monkeypatch):
    """A step of each part, in the order of tiny/README.md, from the sample portraits alone; then the chain opens them."""
    monkeypatch.chdir(tmp_path)  # pool, states and logs go to runs/
    monkeypatch.setattr(pool, "VIEWS", 2)
    monkeypatch.setitem(
        pretrain.UNET, "block_out_channels", [16, 32, 32]
    )  # smaller: the shipped weights hold the real sizes
    monkeypatch.setitem(pretrain.SWINIR, "depths", [1, 1])
    parts = ["vae", "clip", "dino", "posterior-mean", "flow", "unet"]
    command = [*parts, "--data", str(ROOT / "samples" / "clean"), "--out", "made", "--steps", "1", "--batch", "2"]
    assert pretrain.main(pretrain.parse_args([*command, "--sigma-s", "0.05", "--precision", "bf16"])) == 0
    assert {p.parent.name for p in (tmp_path / "runs").glob("*/log.jsonl")} == {f"tiny_{part}" for part in parts}
    assert "made" not in (tmp_path / "made" / "base" / "unet" / "config.json").read_text()
    y = torch.rand(1, 3, SIZE, SIZE)
    pmrf = teacher.PMRF.from_pretrained(tmp_path / "made" / "teacher")
    assert pmrf.sigma_s == 0.05 and pmrf.restore(y, steps=1).shape == y.shape
    config = {**load_config("tiny"), "base": "made/base", "clip": {"name": "made/clip"}, "dino": {"name": "made/dino"}}
    assert student.Student.from_published(config)(y).shape == y.shape
    vae = student.load_vae(config)
    assert pretrain.main(pretrain.parse_args(["decoder", *command[len(parts) :]])) == 0
    again = student.load_vae(config)
    assert torch.equal(student.encode(again, y), student.encode(vae, y))  # latents made before stay good
    z = student.encode(vae, y)
    assert not torch.equal(student.decode(again, z), student.decode(vae, z))


class Killed(Exception):
    pass


def fit_line(folder, monkeypatch, killed_at=None):
    """Eight steps of a small network on random lines, with the process's end before step killed_at; its kept average."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    net, kept = torch.nn.Linear(3, 2), {}

    def loss_fn(step):
        if step == killed_at:
            raise Killed
        loss = (net(torch.randn(4, 3)) - 1).square().mean()
        return loss, {"half": loss / 2}

    recipe = fit.Recipe(steps=8, batch=4, lr=0.1)
    save = lambda average: kept.update(copy.deepcopy(average.state_dict()))  # noqa: E731
    fit.fit("line", net, loss_fn, save, recipe, seed=3, bf16=False)
    return kept


def test_a_part_that_was_killed_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Weights, average, moments, step and random numbers: were one of them lost, the end would differ."""
    monkeypatch.setattr(fit, "LOG_EVERY", 2)
    monkeypatch.setattr(fit, "SAVE_EVERY", 0)
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    expected = fit_line(tmp_path / "unbroken", monkeypatch)
    with pytest.raises(Killed):
        fit_line(tmp_path / "killed", monkeypatch, killed_at=6)
    found = fit_line(tmp_path / "killed", monkeypatch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    logs = [(tmp_path / name / "runs" / "tiny_line" / "log.jsonl").read_text() for name in ("unbroken", "killed")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 4
    monkeypatch.setattr(fit.Recipe, "_asdict", lambda recipe: {"steps": 9})
    with pytest.raises(ValueError, match="give the same, or delete"):
        fit_line(tmp_path / "killed", monkeypatch)


@pytest.fixture(scope="module")
def two_faces(tmp_path_factory):
    return Pool([ROOT / "samples" / "clean"], tmp_path_factory.mktemp("pool"), 0, torch.device("cpu"))


def test_the_pool_gives_pictures_in_the_order_asked_for(two_faces):
    """A batch is random in every part of it: were it sorted, the first half would always be the first faces."""
    index = torch.tensor([VIEWS + 3, 2])
    assert torch.equal(two_faces.get("lq", index), two_faces.get("lq", index.flip(0)).flip(0))
    firsts = {int(two_faces.batch(2, step)[0]) // VIEWS for step in range(20)}
    assert firsts == {0, 1}  # either face may come first
    assert torch.equal(two_faces.batch(2, 7), two_faces.batch(2, 7))
    assert sorted(two_faces.batch(9, 0) // VIEWS) == [0, 1]  # no face twice in a batch


def test_the_pools_pairs_are_one_face_clean_and_degraded(two_faces, tmp_path):
    """Even views from the wide ranges, odd ones from the milder; the same seed gives the same bytes, another is refused."""
    hq, lq = (two_faces.get(name, torch.arange(2 * VIEWS)) for name in ("hq", "lq"))
    psnr = -10 * ((hq - lq) ** 2).mean((1, 2, 3)).log10()
    assert psnr[1::2].mean() > psnr[::2].mean() + 1 and psnr.min() > 8
    collins = square(read_image(ROOT / "samples" / "clean" / "collins.png"), 2 * SIZE)
    picture = Image.fromarray(to_uint8(collins).permute(1, 2, 0).numpy())
    x, y, _ = make_pair(picture, 0, 0, 5)
    assert np.array_equal(x, two_faces.array("hq")[5]) and np.array_equal(y, two_faces.array("lq")[5])
    plain = torch.from_numpy(np.array(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS))).permute(2, 0, 1)
    assert torch.equal(plain, two_faces.array("hq")[0])
    with pytest.raises(ValueError, match="delete that folder"):
        Pool([ROOT / "samples" / "clean"], two_faces.folder, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="found none"):
        Pool([tmp_path], tmp_path, 0, torch.device("cpu"))


def test_arrays_that_were_being_written_are_finished(tmp_path):
    """What is derived from the pictures goes on from the last rows that were written, and names the weights it is from."""

    def rows_from(done, stop=10):
        for i in range(done, 10, 2):
            if i == stop:
                raise Killed
            asked.append(i)
            yield {"squares": np.arange(i, i + 2)[:, None] ** 2}

    asked, record = [], tmp_path / "squares.json"
    with pytest.raises(Killed):
        pool.fill(tmp_path, record, {"of": "a"}, 10, lambda done: rows_from(done, stop=6))
    pool.fill(tmp_path, record, {"of": "a"}, 10, rows_from)
    pool.fill(tmp_path, record, {"of": "a"}, 10, rows_from)  # finished: nothing is asked for
    assert asked == [0, 2, 4, 6, 8] and np.load(tmp_path / "squares.npy")[:, 0].tolist() == [i * i for i in range(10)]


def test_the_readmes_chain_on_the_sample_portraits(tmp_path):
    """Folder of faces -> cache -> Stage A -> Stage B -> restored picture, with the commands' own main functions."""

    def call(script, *arguments):
        assert script.main(script.parse_args(list(map(str, arguments)))) == 0

    a, b, out, lq = tmp_path / "a", tmp_path / "b", tmp_path / "x.png", ROOT / "samples/degraded/medium/collins.png"
    more = ["--cache", tmp_path / "cache", "--batch", 2, "--sgcl-every", 2, "--log-every", 1]
    call(cache, "--data", ROOT / "samples" / "clean", "--out", tmp_path / "cache", "--steps", 2)
    call(train, "--stage", "A", "--out", a, "--steps", 3, "--lr", 5e-5, *more)
    call(train, "--stage", "B", "--init", a, "--out", b, "--steps", 1, *more)
    call(restore, lq, "--checkpoint", b, "-o", out)
    log = [json.loads(line) for line in (a / "log.jsonl").read_text().splitlines()]
    steady = [sum(line["weighted"][term] for term in ("lat", "lpips", "l1")) for line in log]  # SGCL comes and goes
    assert steady[-1] < steady[0]  # at a small rate, on the same two pictures in every step
    assert json.loads((steps_in(b)[-1] / "config.json").read_text())["stage"] == "B"
    assert read_image(out).shape == read_image(lq).shape and not torch.equal(read_image(out), read_image(lq))
