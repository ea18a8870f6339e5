"""Puts the project's root on the import path and keeps every test on two CPU threads and off the network."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

torch.set_num_threads(int(os.environ.get("TEST_THREADS", 2)))

import json
import multiprocessing
import runpy
import socket
import threading
from multiprocessing import forkserver

import pytest
from tqdm import tqdm

from plumbing import commands

FORKS = multiprocessing.get_context("forkserver")  # its processes begin with the imports done, which take seconds
FORKS.set_forkserver_preload(["train", "restore", "peft"])


def pytest_collection_finish(session):
    if any({"forks", "start_script"} & set(item.fixturenames) for item in session.items):
        forkserver.ensure_running()  # now, so that it imports beside the first tests


@pytest.fixture
def forks():
    """multiprocessing's context of such processes, for functions of a test's file."""
    return FORKS


@pytest.fixture
def start_script():
    """start(script, *arguments, err=, **environment): a process that runs it as the command line does; err: what it says."""

    def start(*argv, err, **environment):
        process = FORKS.Process(target=run_script, args=(list(map(str, argv)), err), kwargs=environment)
        process.start()
        return process

    return start


def run_script(argv, err, **environment):
    begin_process(err, environment)
    commands.SCRIPT, sys.argv = argv[0], argv
    runpy.run_path(str(Path(__file__).resolve().parent.parent / argv[0]), run_name="__main__")


def begin_process(err, environment):
    """One CPU thread, no GPU, these variables, and what it says in a file."""
    for stream in (1, 2):
        os.dup2(os.open(err, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update({"CUDA_VISIBLE_DEVICES": ""} | environment)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and outlives one that is killed


def torchruns_variables(world):
    """What torchrun tells each of its processes: a list of environments."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(world)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def pytest_addoption(parser):
    parser.addoption(
        "--commands", action="store_true", help="run the documentation's commands that are marked quick, too"
    )


@pytest.fixture(scope="session")
def small_config(tmp_path_factory):
    """A folder of the published layouts with random weights (SD v1.5's, LCM-LoRA's, timm's, PMRF's), as a config."""
    import timm
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from safetensors.torch import save_file

    import teacher
    from plumbing.presets import load_config

    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=96, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16), norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.18215,
    )  # fmt: skip
    schedule = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)
    for part, name in ((unet, "unet"), (vae, "vae"), (schedule, "scheduler")):
        part.save_pretrained(root / "base" / name)
    for name in ("clip", "dino"):
        arch, size = "vit_tiny_patch16_224", {"img_size": 48, "embed_dim": 96, "depth": 1, "num_heads": 2}
        vit = timm.create_model(arch, num_classes=0, **size)
        (root / name).mkdir()
        mean_std = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}  # [-1, 1] would hide faults
        cfg = {"input_size": [3, 48, 48], "num_classes": 0, **mean_std}
        text = json.dumps({"architecture": arch, "num_classes": 0, "model_args": size, "pretrained_cfg": cfg})
        (root / name / "config.json").write_text(text)
        save_file(vit.state_dict(), root / name / "model.safetensors")
    swinir = teacher.SwinIR(embed_dim=24, depths=[2], num_heads=[2], num_feat=8)
    hdit = teacher.HDiT(3, 3, 4, [32, 64], [1, 1], [5, None], 32, 32, 1)
    torch.nn.init.normal_(hdit.patch_out.proj.weight, std=0.1)
    teacher.PMRF(swinir, hdit).save_pretrained(root / "teacher")
    config = load_config("paper") | {
        "preset": str(root), "stage": "published", "lr": 1e-3, "image_size": 64,
        "teacher": str(root / "teacher"), "base": str(root / "base"), "lcm_lora": None,
        "clip": {"name": str(root / "clip")}, "dino": {"name": str(root / "dino")}, "condition_channels": [16, 16, 16, 32],
        "visual_encoder": {"nf": 32, "emb_dim": 10, "ch_mult": [1, 1, 2], "res_blocks": 1}, "lora_rank": 4,
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))  # so that the folder's name serves as a preset
    return config
