"""The two presets and the settings of a checkpoint: names and sizes of every network, by value.

A preset is a dict. `paper` names the published weights on the Hugging Face hub, `tiny` the folders of this repository; the
classes that read them are the same. A name is a folder of this repository, any other folder, or a hub id.
"""

import contextlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What arguments choose from; here, since they are parsed before the scripts import torch
RANGES = ("difface", "gfpgan", "codeformer", "codeformer-large", "realesrgan")  # of degrade.py
LEVELS = ("light", "medium", "heavy")
ADAPTERS = ("zero-linear", "scalar-gate", "none")  # of adapter.py
ENTRIES = ("mean", "clean", "noised")  # of student.py
PAIRED, SETS = ("psnr", "ssim", "mse", "lpips", "lpips-vgg"), ("fid", "kid", "precision")  # of evaluation/metrics.py:
NO_REFERENCE = ("musiq", "niqe")  # the first need an original, the second compare two folders

PAPER = {
    "preset": "paper",
    "image_size": 512,
    "teacher": "ohayonguy/PMRF_blind_face_image_restoration",
    "base": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "lcm_lora": "latent-consistency/lcm-lora-sdv1-5",
    "clip": {"name": "vit_base_patch16_clip_quickgelu_224.openai"},
    "dino": {"name": "vit_base_patch14_dinov2.lvd142m", "img_size": 518},
    "visual_encoder": {"nf": 64, "emb_dim": 197, "ch_mult": [2, 4, 8], "res_blocks": 2},
    "condition_channels": [16, 32, 96, 256],
    "adapter": "zero-linear",
    "timestep": 499,
    "entry": "mean",
    "lora_rank": 32,
    "lr": 2e-5,
}
TINY = PAPER | {  # in all else like the paper's
    "preset": "tiny",
    "image_size": 256,
    "teacher": "tiny/teacher",
    "base": "tiny/base",
    "lcm_lora": None,
    "clip": {"name": "tiny/clip"},
    "dino": {"name": "tiny/dino"},
    "visual_encoder": {"nf": 32, "emb_dim": 65, "ch_mult": [1, 2, 2], "res_blocks": 1},
    "condition_channels": [16, 32, 48, 64],
    "lr": 5e-4,
}
PRESETS = {"paper": PAPER, "tiny": TINY}


def load_config(name):
    """The settings of "tiny", "paper", or a checkpoint's or run's folder, a dict. ValueError, FileNotFoundError otherwise."""
    if name in PRESETS:
        return json.loads(json.dumps(PRESETS[name]))  # a copy that no caller can change
    path = newest_checkpoint(name) / "config.json"
    with contextlib.suppress(ValueError, AttributeError):  # no JSON, no dict
        config = json.loads(path.read_text())
        if config.keys() >= {"preset", "stage"}:
            return {"entry": "clean"} | config  # checkpoints that name none were trained this way
    raise ValueError(f"expected a DirectFlow checkpoint, got {path} without preset or stage: damaged, name another")


def newest_checkpoint(folder):
    """The folder itself if it is a checkpoint, or the last step-* in a run's folder. FileNotFoundError if there is none."""
    folder = ROOT / "tiny" / "student" if str(folder) == "tiny" else Path(folder)
    if (folder / "config.json").is_file():
        return folder
    if steps := steps_in(folder):
        return steps[-1]
    raise FileNotFoundError(f"expected config.json or a run's step-* in {folder}, found none: train a checkpoint first")


def steps_in(run):
    """The finished checkpoints of a run's folder, oldest first."""
    return sorted(p for p in run.glob("step-??????") if (p / "config.json").is_file())


def locate(name):
    """The path of a folder of this repository; any other folder, or hub id, as it is. FileNotFoundError for a lost tiny/."""
    if (ROOT / name).is_dir():
        return str(ROOT / name)
    if str(name).startswith("tiny/"):
        raise FileNotFoundError(f"expected {name} in this repository, it is missing: restore it from git")
    return str(name)


def check_same(before, now, what, remedy):
    """ValueError that names all settings of the dict `now` that the dict `before`, the settings of `what`, has otherwise."""
    if differ := ", ".join(f"{k} = {before.get(k)!r} (now {v!r})" for k, v in now.items() if before.get(k) != v):
        raise ValueError(f"expected the settings of {what}, got others: {differ}: {remedy}")
