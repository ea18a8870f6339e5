"""Where and how the networks compute: the device, its precision, the processes of torchrun; once for all scripts."""

import os
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist


def choose_device(name="auto", known=("cuda", "mps", "cpu")):
    """torch.device for "auto" (the first of `known` that is there) or a name; of several GPUs the one of this torchrun process.

    Sets what all scripts share: TF32 products in float32 on a GPU (nothing changes on a CPU), and in cuDNN the same kernels in
    every run. ValueError if the machine has no such device, or fewer GPUs than processes.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in known if there[device])
    if not there[name]:
        raise ValueError(f"expected a device that this machine has, got --device {name}: use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(f"expected one process a GPU, got --nproc_per_node above {gpus}: lower it")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


# Parameters from which bf16 is faster on a CPU with AMX. Measured in CPU time, bf16 over float32: 0.36 for the published HDiT
# (160 million), 0.60 for its SwinIR (16 million); 0.95 to 1.0 for the tiny student (20 million) and teacher (6 million).
# Fixed, and not timed when it is needed: so the same machine gives the same bytes.
LARGE = 50_000_000


def precision_of(name, device, parameters):
    """The precision, "fp32" or "bf16". "auto": bf16 on a CUDA GPU, and on a CPU with AMX for a network of LARGE or more."""
    if name != "auto":
        return name
    cpu = Path("/proc/cpuinfo")  # on Linux alone
    amx = cpu.is_file() and "amx_bf16" in cpu.read_text()  # Intel's matrix products in bf16
    return "bf16" if device.type == "cuda" or (device.type == "cpu" and parameters >= LARGE and amx) else "fp32"


def prepare(network, device, precision="auto"):
    """A frozen network, ready to compute: on the device, weights in the precision.

    precision: "auto", "fp32" or "bf16". Buffers (HDiT's frequencies of time), pictures and latents stay float32. Convolutions
    have channels last, except on a CUDA GPU: there torch's GroupNorm copies such pictures to the other layout, and back.
    """
    device = torch.device(device)
    layout = torch.contiguous_format if device.type == "cuda" else torch.channels_last
    network = network.to(device, memory_format=layout).requires_grad_(False)
    if precision_of(precision, device, sum(p.numel() for p in network.parameters())) == "bf16":
        for p in network.parameters():
            p.data = p.data.to(torch.bfloat16)
    return network


def dtype_of(network):
    """The precision of its weights, in which a network takes its input."""
    return next(network.parameters()).dtype


@cache
@torch.inference_mode(False)  # so that a training may use it, too
def constant(values, device):
    """A tuple of numbers as a float32 tensor on the device, made once: to make it anew, the host would wait for a GPU."""
    return torch.tensor(values, device=device)


def processes():
    """rank, number of processes: torchrun's, or 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def cores_a_process():
    """Threads for the pictures: the cores of this machine, shared by its processes of torchrun, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def workers_for(network, device):
    """Threads that restore pictures side by side, one core each: as many as cores, at most four, for a small network on a CPU.

    None for other networks and for functions, which may be many steps: one picture at a time, on all cores. The last bit of a
    picture depends on the number of cores. So a small network always takes one, for a single picture too.
    """
    small = isinstance(network, torch.nn.Module) and sum(p.numel() for p in network.parameters()) < LARGE
    return min(4, cores_a_process()) if small and torch.device(device).type == "cpu" else None


def join(device):
    """Makes this process one of torchrun's."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave():
    """The end of `join`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def synchronize(device):
    """Waits for a GPU's work; torch.device or its name."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
