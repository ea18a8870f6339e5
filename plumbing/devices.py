"""Where and how the networks compute: the device, its precision, the processes of torchrun; once for all scripts."""

import os

import torch
import torch.distributed as dist


def choose_device(name="auto"):
    """torch.device for "auto", "cpu", "cuda" or "mps"; of several GPUs the one of this torchrun process.

    Sets what all scripts share: TF32 products in float32 on a GPU (nothing changes on a CPU), and in cuDNN the same kernels in
    every run. ValueError if the machine has no such device, or fewer GPUs than processes.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, ok in there.items() if ok)
    if not there[name]:
        raise ValueError(f"expected a device that this machine has, got --device {name}: use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"expected one process a GPU, got --nproc_per_node above {torch.cuda.device_count()}: lower it"
        )
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def processes():
    """rank, number of processes: torchrun's, or 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Makes this process one of torchrun's; alone, it does nothing."""
    if processes()[1] > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave():
    """The end of `join`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def synchronize(device):
    """Waits for a GPU's work; torch.device or its name."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
