"""The paper walked through in pictures: what its equations do to a face, drawn from the code that is them; nothing else.

Used by `python evaluate.py figures`. What happens inside a step is not computed a second time here: hooks on the networks
note what went in and out while the real functions run (`noted`). Everything runs on the CPU in float32, with fixed seeds, so
that two runs on one machine write the same bytes.

A picture is rows of (caption, x) with x (3, H, W) in [0, 1]: PICTURES says which function makes which file.
"""

import contextlib
import dataclasses
import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

import degrade
import sgcl
from evaluation.metrics import PictureMetrics
from evaluation.plots import ablation_bars, plane, token_plot
from evaluation.tables import write_text
from plumbing import pictures
from plumbing.commands import say
from plumbing.files import make_folder, write_bytes
from plumbing.presets import ROOT, locate
from student import Student, decode, encode, vit_tokens, x0_from_eps
from teacher import PMRF

DATA = ROOT / "docs" / "data"  # the validation's CSVs
FACE = ROOT / "samples" / "clean" / "collins.png"


class Models:
    """The student, its teacher, a clean face x and its degraded copy y, (1, 3, S, S); note(x_hat): its two numbers as text."""

    def __init__(self, size=None):
        self.student = Student.load("tiny", merge=True)
        self.teacher = PMRF.from_pretrained(locate(self.student.config["teacher"]))
        self.size = size or self.student.image_size
        self.x = pictures.square(pictures.read_image(FACE), self.size)[None]
        self.y = degrade.apply(self.x[0], degrade.level("medium", self.size))[None]
        self.metrics = PictureMetrics(["psnr", "lpips"], "cpu")

    def note(self, x_hat):
        values = self.metrics(x_hat[0].clamp(0, 1), self.x[0])
        return f"{values['psnr']:.2f} dB, LPIPS {values['lpips']:.3f}"


@contextlib.contextmanager
def noted(*networks):
    """Inside, a list of (network, arguments, keywords, result) of each call of the networks, in the order of their ends."""
    calls = []
    with contextlib.ExitStack() as hooks:
        for network in networks:
            hooks.enter_context(network.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True))
        yield calls


# --- the pictures ------------------------------------------------------------------------------------------------------


def degradation(m):
    """Sec. 4: one face through blur, downsampling, noise, JPEG, and up again, for the three fixed levels."""
    rows = []
    for name in degrade.LEVELS:
        p = degrade.level(name, m.size)
        steps = list(degrade.one_pass(m.x[0].double().numpy() * 255, p, m.x.shape[2:]))
        captions = [f"blur, sigma {p.sigma_x:.2g} px", f"down, r = {p.down:.3g}", f"noise, delta {p.noise:g} / 255",
                    f"JPEG, q = {p.jpeg}", f"up: y, {name}"]  # fmt: skip
        shown = [torch.from_numpy(v).float() / 255 for v in steps] + [degrade.apply(m.x[0], p)]
        rows.append([("x", m.x[0]), *zip(captions, shown, strict=True)])
    return rows


def transport(m):
    """Eq. 2-4: the posterior mean, the flow's states and velocities in 25 steps, and the ends of 1, 2, 5, 25 steps."""
    x_mmse = m.teacher.posterior_mean(m.y)
    with noted(m.teacher.model) as calls:
        end = m.teacher.restore(m.y, steps=25, seed=0)
    way = [(i / 25, x_t, v) for i, (_, (x_t, _), _, v) in enumerate(calls)][:21:4]  # t = 0, 0.16, ... 0.8
    states = [(f"x_t, t = {t:g}", x_t) for t, x_t, _ in way]
    velocities = [(f"v(x_t, t = {t:g}), x 2", signed(v, 2)) for t, _, v in way]
    ends = [(f"{k} step{'s' * (k > 1)}\n{m.note(v)}", v)
            for k in (1, 2, 5, 25) for v in [m.teacher.restore(m.y, steps=k, seed=0)]]  # fmt: skip
    top = [(f"y\n{m.note(m.y)}", m.y), (f"X* (Eq. 2)\n{m.note(x_mmse)}", x_mmse), *ends, ("X, the original", m.x)]
    change = ("x(1) - X*, x 4", signed(end - x_mmse, 4))
    return [top, [*states, ("x(1) (Eq. 4)", end)], [*velocities, change]]


def bridge(m):
    """Sec. 3.2: the teacher's picture, the first channels of its latent, what comes back, and 8 times the difference."""
    x_target = m.teacher.restore(m.y, seed=0)
    z = encode(m.student.vae, x_target)
    back = decode(m.student.vae, z)
    psnr = m.metrics(back[0].clamp(0, 1), x_target[0])["psnr"]
    channels = [(f"z, channel {i + 1} of {z.shape[1]}", channel(z, i)) for i in range(3)]
    after = [(f"D(E(T(y)))\n{psnr:.1f} dB to T(y)", back), ("8 times the difference", signed(back - x_target, 8))]
    return [[("T(y), the teacher's picture", x_target), *channels, *after]]


def one_step(m):
    """Eq. 5: what enters the UNet, what it says, and what the step makes of it, beside the teacher's picture."""
    s = m.student
    with noted(s.unet) as calls:
        z = s.step(encode(s.vae, m.y), m.y)
    ((_, (z_tau, *_), _, said),) = calls
    x_0 = x0_from_eps(z_tau, said.sample, s.alphas_bar[s.tau])
    x_hat, x_target = decode(s.vae, z), m.teacher.restore(m.y, seed=0)
    moved = decode(s.vae, x_0) - decode(s.vae, encode(s.vae, m.y))
    into = [(f"y\n{m.note(m.y)}", m.y), (f"D(z_tau), tau = {s.tau}", decode(s.vae, z_tau))]
    into += [("eps, first 3 channels", channel(said.sample))]
    out = [("D(x_0) - D(z_y), x 2", signed(moved, 2)), ("x_0, first 3 channels", channel(x_0))]
    out += [(f"S(y) = D(z)\n{m.note(x_hat)}", x_hat)]
    beside = [(f"T(y), 25 steps\n{m.note(x_target)}", x_target), ("4 times S(y) - T(y)", signed(x_hat - x_target, 4))]
    return [into, out, [*beside, ("X, the original", m.x)]]


def tokens(m, copies=200):
    """Sec. 3.3.1, SVG: the tokens of many degraded copies of the face on two axes, coloured by what was done to them."""
    ranges, rng = dataclasses.replace(degrade.RANGES["difface"], gray=0.0), np.random.default_rng(0)
    drawn = [degrade.sample(rng, ranges, m.size) for _ in range(copies)]
    e_dino = [vit_tokens(m.student.dino, degrade.apply(m.x[0], p)[None])[0, 0].numpy() for p in drawn]
    parameters = {"blur, px": [(p.sigma_x * p.sigma_y) ** 0.5 for p in drawn], "down": [p.down for p in drawn],
                  "noise": [p.noise for p in drawn], "JPEG": [p.jpeg for p in drawn]}  # fmt: skip
    return token_plot(np.stack(e_dino), {name: np.array(values, float) for name, values in parameters.items()})


def adapter(m):
    """Sec. 3.3.1: the student's picture with the adapter's token and without, at each level."""
    rows = []
    for name in degrade.LEVELS:
        y = degrade.apply(m.x[0], degrade.level(name, m.size))[None]
        with_token = m.student(y)
        with m.student.adapter.register_forward_hook(lambda _, args, z: 0 * z):
            without = m.student(y)
        shown = [(f"y, {name}\n{m.note(y)}", y), (f"with\n{m.note(with_token)}", with_token)]
        difference = ("8 times with - without", signed(with_token - without, 8))
        rows.append([*shown, (f"without\n{m.note(without)}", without), difference])
    return rows


def critic(m, times=(0.05, 0.1, 0.15, 0.25)):
    """Eq. 7-9: x_t, x_clean and the gradient at four times, on the left from noise, on the right from the posterior mean."""
    x_hat, x_mmse = m.student(m.y), m.teacher.posterior_mean(m.y)
    eps = torch.randn(x_hat.shape, generator=torch.Generator().manual_seed(0))
    sources = {"noise": eps, "X*": sgcl.mmse_source(x_mmse, eps, m.teacher.sigma_s)}
    rows = [[("x_hat", x_hat)], [("X*", x_mmse)], [("X, the original", m.x)]]
    for name, source in sources.items():
        for t in times:
            for row, (title, x) in zip(rows, critic_at(m, x_hat, torch.tensor([t]), source).items(), strict=True):
                row.append((f"{title}\nfrom {name}, t = {t:g}", x))
    return rows


def critic_at(m, x_hat, t, source):
    """By title: x_t (Eq. 7), x_clean (Eq. 8), and x_hat - x_clean, what Eq. 9's gradient is but for the factor 2 / N."""
    x_t = sgcl.perturb(x_hat, t, source)
    x_clean = sgcl.clean_estimate(x_t, t, m.teacher.velocity)
    with torch.enable_grad():
        leaf = x_hat.clone().requires_grad_()
        sgcl.sgcl_loss(leaf, m.teacher.velocity, t, source).backward()
    return {"x_t": x_t, "x_clean": x_clean, "gradient x N / 2": signed(leaf.grad * leaf.numel() / 2, 1)}


# --- drawing ----------------------------------------------------------------------------------------------------------


def signed(v, gain):
    """A signed picture on grey: zero is 0.5."""
    return 0.5 + gain * v / 2


def channel(z, i=None):
    """Channel i of a latent (1, C, h, w) as grey, or its first three as red, green, blue; each in its own range."""
    z = z[0, :3] if i is None else z[0, [i] * 3]
    low, high = (z.flatten(1).quantile(q, dim=1)[:, None, None] for q in (0.01, 0.99))
    return (z - low) / (high - low)


def draw(rows, side):
    """Rows of (caption, x) as one picture: tiles of `side` px, small ones enlarged pixel by pixel, captions above them."""
    gap, top, font = 8, 36, ImageFont.load_default(13)
    columns, width, height = max(map(len, rows)), side + gap, side + top + gap
    sheet = Image.new("RGB", (columns * width + gap, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for j, row in enumerate(rows):
        for i, (caption, x) in enumerate(row):
            left, upper = i * width + gap, j * height + top
            tile = to_pil_image(pictures.to_uint8(x[0] if x.ndim == 4 else x))
            how = Image.Resampling.NEAREST if tile.width < side else Image.Resampling.LANCZOS
            sheet.paste(tile.resize((side, side), how), (left, upper))
            pen.text((left, upper - 3), caption, "black", font, anchor="ld")
    return sheet


def jpeg(sheet, quality):
    """The bytes of a picture as JPEG, without chroma subsampling."""
    f = io.BytesIO()
    sheet.save(f, "JPEG", quality=quality, subsampling=0)
    return f.getvalue()


# --- the command ------------------------------------------------------------------------------------------------------

PICTURES = {  # file: its rows, the side of a tile in pixels, the quality of JPEG that keeps it below 300 kB
    "sec4-degradation.jpg": (degradation, 192, 92),
    "eq2-4-transport.jpg": (transport, 192, 80),
    "sec32-bridge.jpg": (bridge, 224, 92),
    "eq5-one-step.jpg": (one_step, 256, 92),
    "sec331-adapter.jpg": (adapter, 256, 92),
    "eq7-9-sgcl.jpg": (critic, 160, 60),
}


@torch.no_grad()
def figures(out, quality=None, ablation=None):
    """Writes every figure into the folder `out`. quality, ablation: CSVs for the two plots (None: those in DATA, if any).

    ValueError if a CSV is not what evaluate.py writes, OSError if it is not there.
    """
    make_folder(out)
    plots = {"fig1b-plane.svg": (plane, quality, "quality.csv")}
    plots |= {"tab3-ablation.svg": (ablation_bars, ablation, "ablation.csv")}
    for name, (plot, path, ours) in plots.items():
        if path or (DATA / ours).is_file():
            write_text(out / name, plot(path or DATA / ours))
            say(out / name)
        else:
            say(f"{out / name}: left out, there is no {DATA / ours}")
    models = Models()
    for name, (rows, side, quality) in PICTURES.items():
        write_bytes(out / name, jpeg(draw(rows(models), side), quality))
        say(out / name)
    write_text(out / "sec331-token.svg", tokens(models))
    say(out / "sec331-token.svg")
