"""Figures and pages (evaluate.py figures, report --run): they show what the code does, in files of bounded size."""

import json
import re

import numpy as np
import pytest
import torch

import evaluate
from evaluation import figures, plots, svg
from plumbing import commands


@pytest.fixture(scope="module")
def models():
    return figures.Models(size=64)


def call(*args):
    return evaluate.main(evaluate.parse_args([str(a) for a in args]))


def tile(rows, start):
    """The pictures whose captions begin with `start`, (3, H, W) each."""
    return [x[0] if x.ndim == 4 else x for row in rows for caption, x in row if caption.startswith(start)]


# --- what the pictures show


@torch.no_grad()
def test_eq4_states_and_velocities_shown_are_those_of_the_transport(models):
    rows = figures.transport(models)
    states, velocities = tile(rows, "x_t"), [v - 0.5 for v in tile(rows, "v(")]  # half of twice v
    x_mmse = models.teacher.posterior_mean(models.y)[0]
    noise = torch.randn(models.x.shape[1:], generator=torch.Generator().manual_seed(0))
    assert torch.allclose(states[0], x_mmse + models.teacher.sigma_s * noise, atol=1e-5)
    for i in range(5):  # over 4 of the 25 steps v changes little
        assert (states[i + 1] - states[i] - velocities[i] * 4 / 25).abs().mean() < 0.3 * (
            states[i + 1] - states[i]
        ).abs().mean()
    assert torch.equal(tile(rows, "25 steps")[0], tile(rows, "x(1) (Eq. 4)")[0])


@torch.no_grad()
def test_eq5_picture_shown_is_the_students(models):
    rows = figures.one_step(models)
    assert torch.allclose(tile(rows, "S(y)")[0], models.student(models.y)[0], atol=1e-5)
    assert torch.allclose(
        (tile(rows, "4 times")[0] - 0.5) / 2, models.student(models.y)[0] - tile(rows, "T(y)")[0], atol=1e-5
    )


@torch.no_grad()
def test_eq9_gradient_shown_is_the_distance_to_the_clean_estimate(models):
    rows = figures.critic(models, times=(0.1, 0.2))
    (x_hat,) = tile(rows, "x_hat")
    for clean, gradient in zip(tile(rows, "x_clean"), tile(rows, "gradient"), strict=True):
        assert torch.allclose(2 * (gradient - 0.5), x_hat - clean, atol=1e-5)


@torch.no_grad()
def test_sec331_without_the_adapter_is_without_and_only_then(models):
    before = models.student(models.y)
    shown = figures.adapter(models)
    assert torch.equal(models.student(models.y), before)
    kind, models.student.adapter.kind = models.student.adapter.kind, "none"
    assert torch.equal(tile(shown, "without")[1], models.student(models.y)[0])
    models.student.adapter.kind = kind


@torch.no_grad()
def test_a_picture_is_small_and_has_the_same_bytes_twice(models):
    first, second = (figures.jpeg(figures.draw(figures.degradation(models), 64), 92) for _ in range(2))
    assert first == second and len(first) > 1000
    for name in figures.PICTURES:
        assert (figures.ROOT / "docs" / "figures" / name).stat().st_size < 300_000


def test_figures_writes_its_files_and_names_the_plots_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "PICTURES", {"x.jpg": (figures.degradation, 32, 92)})
    monkeypatch.setattr(figures, "tokens", lambda m: figures.token_plot(np.eye(3), {"blur": np.arange(3.0)}))
    csv = tmp_path / "quality.csv"
    csv.write_text("level,method,face,psnr,lpips\ngiven,input,a,20,0.5\ngiven,input,b,22,0.4\n")
    monkeypatch.setattr(figures, "DATA", tmp_path / "none")
    assert call("figures", "--out", tmp_path / "out", "--quality", csv) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"x.jpg", "fig1b-plane.svg", "sec331-token.svg"}
    assert f"left out, there is no {tmp_path / 'none' / 'ablation.csv'}" in capsys.readouterr().out


# --- plots


def test_ticks_are_round_numbers_in_range():
    assert svg.ticks(0.03, 1.02) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.ticks(21.5, 22.6) == [21.6, 21.8, 22.0, 22.2, 22.4, 22.6]


def test_axes_place_data_upwards():
    a = svg.Axes((10, 20, 100, 50), (0, 2), (0, 1))
    assert a.place(0, 0) == (10, 70) and a.place(2, 1) == (110, 20)


def test_fig1b_points_are_the_means_and_the_teachers_steps_are_joined(tmp_path):
    rows = {
        "input": (20, 0.5),
        "teacher, 1 step": (24, 0.2),
        "teacher, 5 steps": (23, 0.1),
        "teacher through the VAE": (1, 1),
    }
    lines = [f"heavy,{name!r},{face},{p + d},{v}" for name, (p, v) in rows.items() for face, d in (("a", -1), ("b", 1))]
    (tmp_path / "q.csv").write_text("level,method,face,psnr,lpips\n" + "\n".join(lines).replace("'", '"') + "\n")
    text = plots.plane(tmp_path / "q.csv")
    dots = [(float(x), float(y)) for x, y in re.findall(r'circle cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert len(dots) == 3 and dots[0][0] < dots[2][0] < dots[1][0] and dots[0][1] < dots[1][1] < dots[2][1]
    line = re.search(rf'points="{dots[1][0]},{dots[1][1]} {dots[2][0]},{dots[2][1]}"', text)
    assert line and ">5<" in text and "through the VAE" not in text


def test_tab3_bars_are_paired_differences_from_the_full_model(tmp_path):
    full = [(20, 0.5), (30, 0.1)]  # faces differ far more than rows
    rows = {"full": full, "worse": [(p - 1, v + 0.1) for p, v in full], "better": [(p + 2, v - 0.05) for p, v in full]}
    lines = [
        f"{name},{seed},{i},{p},{v}"
        for name, faces in rows.items()
        for seed in (0, 1)
        for i, (p, v) in enumerate(faces)
    ]
    (tmp_path / "a.csv").write_text("row,seed,face,psnr,lpips\n" + "\n".join(lines) + "\n")
    text = plots.ablation_bars(tmp_path / "a.csv")
    widths = [float(w) for w in re.findall(r'<rect x=.*?width="([\d.]+)" height="[\d.]+" fill="#', text)]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01) and widths[2] == pytest.approx(2 * widths[3], rel=0.01)
    colours = re.findall(r'height="[\d.]+" fill="(#\w+)"', text)
    assert colours == [plots.COLOURS[1], plots.COLOURS[2]] * 2 and "full model&#x27;s 25 dB" in text


def test_sec331_axes_find_what_the_tokens_say():
    rng = np.random.default_rng(0)
    blur, noise = rng.normal(size=(2, 300))
    tokens = np.outer(3 * blur, rng.normal(size=16)) + np.outer(noise, rng.normal(size=16))
    u = plots.principal_axes(tokens, blur)
    assert plots.explained(u, blur) > 0.999 and plots.explained(u, noise) > 0.999
    assert plots.explained(u, rng.normal(size=300)) < 0.05 and np.corrcoef(u[:, 0], blur)[0, 1] > 0.9


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "level,method,face,psnr,lpips\n"])
def test_a_csv_of_something_else_is_one_line(tmp_path, text, capsys):
    (tmp_path / "q.csv").write_text(text)
    assert call("figures", "--out", tmp_path / "out", "--quality", tmp_path / "q.csv") == 1
    assert re.fullmatch(r".*expected rows with level, .* in .*q.csv, got no .*\n", capsys.readouterr().err)


def test_a_csv_that_is_not_there_is_one_line(tmp_path, capsys):
    assert call("figures", "--out", tmp_path / "out", "--ablation", tmp_path / "a.csv") == 1
    assert re.fullmatch(r".*expected a file, got .*a.csv, which does not exist.*\n", capsys.readouterr().err)


# --- the page of a training


def log_line(step, sgcl=0.0, seconds=2.0):
    raw = {"lat": 1 / step, "lpips": 0.5, "l1": 0.1, "sgcl": sgcl}
    weighted = {name: 2 * value for name, value in raw.items()}
    line = {"step": step, "seconds": seconds, "processes": 1, "lr": 1e-3, "loss": sum(weighted.values())}
    return json.dumps(line | {"raw": raw, "weighted": weighted}) + "\n"


def test_report_of_a_run_that_goes_on(tmp_path):
    run, page = tmp_path / "run <b>", tmp_path / "page.html"
    run.mkdir()
    (run / "log.jsonl").write_text(log_line(10) + log_line(20, sgcl=0.3) + log_line(30)[:40])  # the last in the writing
    assert call("report", "--run", run, "--out", page) == 0
    text = page.read_text()
    assert "Step 20, " in text and "steps a second: 5<" in text and "run &lt;b&gt;" in text and "No picture yet" in text
    assert "SGCL, raw: 0.3<" in text and "latent, raw: 0.05<" in text and "learning rate: 0.001<" in text
    (run / "step-000020").mkdir()
    (run / "step-000020" / "config.json").write_text('{"preset": "tiny", "stage": "A", "batch": 4, "steps": 100}')
    (run / "grid.png").write_bytes(b"a picture")
    assert call("report", "--run", run, "--out", page) == 0
    text = page.read_text()
    assert "Step 20 of 100, " in text and "samples a second: 20<" in text and "<td>batch<td>4" in text
    assert "YSBwaWN0dXJl" in text and not re.search(r"(src|href)=\"?http|<script|@import|url\(", text)


@pytest.mark.parametrize("log", [None, "", '{"step": 1', "{}}\n", '{"step": {}}\n'])
def test_report_of_no_run_is_one_line(tmp_path, log, capsys):
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    assert call("report", "--run", tmp_path, "--out", tmp_path / "page.html") == 1
    assert (
        re.fullmatch(r".*expected .*log.jsonl.*\n", capsys.readouterr().err) and not (tmp_path / "page.html").exists()
    )


def test_report_of_a_run_takes_no_options_of_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "SCRIPT", "evaluate.py")
    with pytest.raises(SystemExit):
        call("report", "--run", tmp_path, "--metrics", "psnr", "--hq", "x", "--out", tmp_path / "page.html")
    assert "--hq --metrics belong to pictures" in capsys.readouterr().err
