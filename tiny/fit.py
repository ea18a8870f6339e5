"""One training loop for every part of the tiny model, and the state from which a part goes on (no section of the paper).

AdamW with warm-up and cosine decay, and an exponential moving average of the weights, which is what is kept. Every random
number of a step follows from (seed, step). So weights, average, AdamW's two moments and the step are all that a part needs
to go on: runs/tiny_NAME/step-NNNNNN, written about once a minute, whole or not at all. log.jsonl beside it is its log.
"""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from plumbing import runs
from plumbing.files import make_folder
from train import update_ema

LOG_EVERY = 20  # steps; only these wait for a GPU
SAVE_EVERY = 60  # seconds


class Recipe(NamedTuple):
    steps: int
    batch: int
    lr: float  # of AdamW, after the warm-up


def fit(name, model, loss_fn, save, recipe, seed, bf16):
    """Trains model and hands it, with its average as weights, to save(model), about once a minute and at the end.

    loss_fn(step) -> (loss, {name: figure for the log}), scalar tensors. The same call goes on from the last saved state.
    Raises ValueError if the loss is not finite, or if the saved state is of another recipe or seed.
    """
    device, betas, out = next(model.parameters()).device, (0.9, 0.99), make_folder(Path("runs") / f"tiny_{name}")
    on_gpu = device.type == "cuda"
    model.train().to(memory_format=torch.channels_last)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), recipe.lr, betas, weight_decay=0.01, fused=on_gpu)
    settings = {"preset": "tiny", "stage": name, **recipe._asdict(), "seed": seed, "bf16": bf16}
    first, ema = resume(out, trained, optimizer, settings)
    runs.trim(out / "log.jsonl", first)
    saved = time.monotonic()
    for step in tqdm(range(first + 1, recipe.steps + 1), name, recipe.steps, initial=first, mininterval=10):
        torch.manual_seed((seed << 32) + step)
        optimizer.param_groups[0]["lr"] = learning_rate(step, recipe)
        # plain attention on a CPU, whose fused kernel is slow backwards: a step takes 0.78 to 0.99 of the time
        attention = contextlib.nullcontext() if on_gpu else sdpa_kernel(SDPBackend.MATH)
        with attention, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, figures = loss_fn(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        update_ema(ema, trained, step)
        if step % LOG_EVERY and step < recipe.steps:
            continue
        if not torch.isfinite(loss):
            raise ValueError(f"{name}: the loss is {loss.item()} at step {step}: the same command goes on from before")
        line = {"step": step, "loss": loss.item(), **{k: v.item() for k, v in figures.items()}}
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        if time.monotonic() - saved > SAVE_EVERY or step == recipe.steps:
            checkpoint(out, step, trained, ema, optimizer, settings)
            with runs.averaged(trained, ema):
                save(model)
            saved = time.monotonic()
    with runs.averaged(trained, ema):
        save(model)  # a kill may have come between the state and the weights


def learning_rate(step, recipe):
    """Up in 50 steps, then down along a cosine to a fiftieth."""
    return recipe.lr * min(1, step / 50) * (0.51 + 0.49 * math.cos(math.pi * step / recipe.steps))


def checkpoint(out, step, trained, ema, optimizer, settings):
    def fill(folder):
        runs.save_training(folder / "training.safetensors", trained, optimizer)
        save_file({name: v.contiguous() for name, v in ema.items()}, folder / "ema.safetensors")
        (folder / "config.json").write_text(json.dumps(settings | {"step": step}))

    runs.write(out, step, fill, keep=1)


def resume(out, trained, optimizer, settings):
    """Puts a saved state back in place. Returns its step (0: there is none) and the average; ValueError as check_settings."""
    found = runs.steps_in(out)
    if not found:
        return 0, {name: p.detach().clone() for name, p in trained.items()}
    folder = found[-1]
    runs.check_settings(folder, settings, otherwise=f"delete {out}")
    step = json.loads((folder / "config.json").read_text())["step"]
    runs.load_training(folder / "training.safetensors", trained, optimizer, step)
    saved = load_file(folder / "ema.safetensors")
    return step, {name: saved[name].to(p) for name, p in trained.items()}
