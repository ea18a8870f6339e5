"""Checkpoints of a training run, safe against being killed (no section of the paper; train.py's ground).

A run's folder holds step-NNNNNN/ folders, each whole or absent: written under a temporary name, flushed to the disk, renamed.
What Student.save writes is in them (the EMA weights), and training.safetensors: the raw weights and AdamW's two moments.
Everything else that a run needs to go on (sampler position, learning rate, random numbers) is a function of step and seed.
"""

import contextlib
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

from plumbing.pictures import sync, write_bytes
from plumbing.presets import load_config

MOMENTS = ("exp_avg", "exp_avg_sq")


def steps_in(out):
    """The finished checkpoints of a run's folder, oldest first."""
    return sorted(p for p in out.glob("step-??????") if (p / "config.json").is_file())


def write(out, step, fill, keep=2):
    """Makes out/step-NNNNNN by fill(folder), whole or not at all, and drops all but the last `keep`.

    What fill raises comes through (a full disk is an OSError); the checkpoints before stay as they are.
    """
    final, temporary = out / f"step-{step:06d}", out / f"step-{step:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
        except Exception as e:  # safetensors and diffusers have errors of their own for a full disk
            raise OSError(
                f"could not write {final} ({e}): make room, the same command goes on from the checkpoint before it"
            ) from e
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if final not in steps_in(out):
            shutil.rmtree(final, ignore_errors=True)  # of that name, but no checkpoint
            os.replace(temporary, final)
        sync(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in {*out.glob("step-??????")} - {*steps_in(out)[-keep:]}:
        shutil.rmtree(old)  # what a killed process has half removed, too


def save_training(path, trained, optimizer):
    """Raw weights and AdamW's moments of the trained parameters {name: parameter}, by name, as safetensors."""
    tensors = {f"weight.{name}": p.detach() for name, p in trained.items()}
    for key in MOMENTS:
        tensors |= {f"{key}.{name}": optimizer.state[p][key] for name, p in trained.items() if p in optimizer.state}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def load_training(path, trained, optimizer, step):
    """Puts back what save_training wrote. ValueError if the file is cut or of another run."""
    try:
        tensors = load_file(path)
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(tensors[f"weight.{name}"])
                if f"exp_avg.{name}" in tensors:
                    moments = {key: tensors[f"{key}.{name}"].to(p.device) for key in MOMENTS}
                    optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    except Exception as e:  # safetensors has errors of its own
        raise ValueError(
            f"expected the state of a run in {path}, got {e}: delete {path.parent} to go on from before"
        ) from None


def check_settings(folder, now):
    """ValueError that names the first setting of the checkpoint that differs from `now`."""
    config = load_config(folder)
    for name, value in now.items():
        if config.get(name) != value:
            raise ValueError(
                f"expected {name} = {config.get(name)!r}, as in {folder}, got {value!r}: give the same, or another --out"
            )


def trim_log(path, step):
    """Drops what a killed run logged after its last checkpoint: those steps are made again."""
    if path.is_file():
        whole = [line for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}}")]
        kept = "".join(line + "\n" for line in whole if json.loads(line)["step"] <= step)
        write_bytes(path, kept.encode())  # whole or not at all: a run can be killed here, too


@contextlib.contextmanager
def averaged(trained, ema):
    """Inside, the trained parameters have their EMA values."""
    raw = {name: p.detach().clone() for name, p in trained.items()}
    try:
        for name, p in trained.items():
            p.data.copy_(ema[name])
        yield
    finally:
        for name, p in trained.items():
            p.data.copy_(raw[name])
