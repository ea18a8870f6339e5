"""One training loop for every part of the tiny model, and the state from which a part goes on (no section of the paper).

AdamW with warm-up and cosine decay, and an exponential moving average of the weights, which is what is kept. Every random
number of a step follows from (seed, step). So weights, average, AdamW's two moments and the step are all that a part needs
to go on: runs/tiny_NAME.safetensors, written about once a minute, whole or not at all. runs/tiny_NAME.jsonl is its log.

    fit("vae", vae, loss_fn, save, Recipe(steps=800, batch=32, lr=1e-3), seed=0, bf16=True)
"""

import contextlib
import copy
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from plumbing.files import write_bytes
from train import update_ema

LOG_EVERY = 20  # steps; only these wait for a GPU
SAVE_EVERY = 60  # seconds


class Recipe(NamedTuple):
    steps: int
    batch: int
    lr: float  # of AdamW, after the warm-up


def fit(name, model, loss_fn, save, recipe, seed, bf16):
    """Trains model and hands its average to save(average), about once a minute and at the end.

    loss_fn(step) -> (loss, {name: figure for the log}), scalar tensors. The same call goes on from the last saved state.
    Raises ValueError if the loss is not finite, or if the saved state is of another recipe or seed.
    """
    device = next(model.parameters()).device
    model.train().to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    betas, on_gpu = (0.9, 0.99), device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, betas, weight_decay=0.01, fused=on_gpu)
    settings, path = {**recipe._asdict(), "seed": seed, "bf16": bf16}, Path("runs") / f"tiny_{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    first = load_state(path, model, average, optimizer, settings)
    log, saved = begin_log(path.with_suffix(".jsonl"), first), time.monotonic()
    for step in tqdm(range(first + 1, recipe.steps + 1), name, recipe.steps, initial=first, mininterval=10):
        torch.manual_seed((seed << 32) + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        with attention(on_gpu), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, figures = loss_fn(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(dict(average.named_parameters()), dict(model.named_parameters()), step)
        if step % LOG_EVERY and step < recipe.steps:
            continue
        if not torch.isfinite(loss):
            raise ValueError(f"{name}: the loss is {loss.item()} at step {step}: the same command goes on from before")
        log.write(json.dumps({"step": step, "loss": loss.item(), **{k: v.item() for k, v in figures.items()}}) + "\n")
        log.flush()
        if time.monotonic() - saved > SAVE_EVERY or step == recipe.steps:
            save_state(path, model, average, optimizer, settings, step)
            save(average)
            saved = time.monotonic()
    save(average)  # a kill may have come between the state and the weights
    log.close()


def attention(on_gpu):
    """Plain attention on a CPU, whose fused kernel is slow backwards: a step takes 0.78 to 0.99 of the time."""
    return contextlib.nullcontext() if on_gpu else sdpa_kernel(SDPBackend.MATH)


def learning_rate(step, recipe):
    """Up in 50 steps, then down along a cosine to a fiftieth."""
    return recipe.lr * min(1, step / 50) * (0.51 + 0.49 * math.cos(math.pi * step / recipe.steps))


# --- the state ----------------------------------------------------------------------------------------------------------


def moments(model, optimizer):
    """AdamW's two moments of each parameter, {"exp_avg.name": tensor, ...}: those of its state, or new ones put into it."""
    found = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device if optimizer.defaults["fused"] else "cpu")
            state |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        found |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return found


def all_tensors(model, average, optimizer):
    found = {f"model.{name}": v for name, v in model.state_dict().items()}
    return found | {f"average.{name}": v for name, v in average.state_dict().items()} | moments(model, optimizer)


def save_state(path, model, average, optimizer, settings, step):
    tensors = {k: v.detach().contiguous().cpu() for k, v in all_tensors(model, average, optimizer).items()}
    record = {"settings": json.dumps(settings), "step": str(step)}
    write_bytes(path, safetensors.torch.save(tensors, record))


@torch.no_grad()
def load_state(path, model, average, optimizer, settings):
    """Puts a saved state back in place. Returns its step, or 0 if there is none; ValueError if it is of another command."""
    if not path.is_file():
        return 0
    with safetensors.safe_open(path, "pt") as f:
        before, step = json.loads(f.metadata()["settings"]), int(f.metadata()["step"])
        if before != settings:
            raise ValueError(f"expected {before}, as in {path}, got {settings}: give the same, or delete that file")
        for name, tensor in all_tensors(model, average, optimizer).items():
            tensor.copy_(f.get_tensor(name))
    for state in optimizer.state.values():
        state["step"].fill_(step)
    return step


def begin_log(path, first):
    """The log, open for writing, with the lines up to step `first`: what comes later is made again."""
    lines = path.read_text().splitlines(keepends=True) if first and path.is_file() else []
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= first]
    write_bytes(path, "".join(kept).encode())
    return open(path, "a")
