"""Time and memory a picture (Tab. 1, "Time"): the student's one step and its parts beside the teacher's K steps.

Medians of several runs after one to warm up, one picture at a time, float32, on the device of the models. Used by
`python evaluate.py speed`, which loads the models and prints the tables: (header, rows) each.
"""

import ctypes
import statistics
import time
from pathlib import Path

import timm
import torch
from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel

from plumbing.published import HDIT, SWINIR
from student import Student, decode, encode
from teacher import PMRF, HDiT, SwinIR


def whole_table(student, teacher, y, steps, repeats, one_step=False):
    """Student, posterior mean and teacher at each K of steps, on the picture y (1, 3, S, S).

    one_step: time the posterior mean and a single Euler step, and compute mmse + K x step from them, since a step costs
    the same wherever it starts. The rows say so.
    """
    runs = {"student, 1 step": lambda: student(y), "posterior mean": lambda: teacher.posterior_mean(y)}
    if one_step:
        runs["one Euler step"] = lambda: teacher.velocity(y, 0.0)
    else:
        runs |= {f"teacher, {k} step{'s' * (k > 1)}": lambda k=k: teacher.restore(y, steps=k) for k in steps}
    ms = {name: median_ms(run, repeats, y.device) for name, run in runs.items()}
    memory = {name: working_memory(run, y.device) for name, run in runs.items()}
    if one_step:
        ms |= {
            f"teacher, {k} step{'s' * (k > 1)} (computed)": ms["posterior mean"] + k * ms["one Euler step"]
            for k in steps
        }
    first = ms["student, 1 step"]
    rows = [[name, f"{t:.1f}", f"{t / first:.2f}", memory.get(name, "as one step")] for name, t in ms.items()]
    return ["", "ms a picture", "times the student", "memory beyond the weights, MB"], rows


def parts_table(student, y, repeats):
    """The parts of the student's one step, each run alone with what it gets in a real step, and its share of their sum."""
    ms = {name: median_ms(run, repeats, y.device) for name, run in parts(student, y).items()}
    rows = [[name, f"{t:.1f}", f"{100 * t / sum(ms.values()):.0f} %"] for name, t in ms.items()]
    return ["part of the student", "ms", "share"], rows


def parts(student, y):
    """{part: function that runs it alone}; the arguments of the inner ones are caught in one real step."""
    inner, seen, hooks = {"spatial encoder": student.spatial_encoder, "UNet": student.unet}, {}, []
    inner["visual encoder"] = student.visual_encoder
    for name, module in inner.items():

        def catch(module, args, kwargs, name=name):
            seen[name] = (args, kwargs)

        hooks.append(module.register_forward_pre_hook(catch, with_kwargs=True))
    with torch.inference_mode():
        z = student.step(encode(student.vae, y), y)
    for hook in hooks:
        hook.remove()

    def run(name):
        args, kwargs = seen[name]
        return lambda: inner[name](*args, **kwargs)

    return {
        "VAE encoder": lambda: encode(student.vae, y),
        "CLIP and DINOv2": lambda: student.features(y),
        **{name: run(name) for name in ("visual encoder", "spatial encoder", "UNet")},
        "VAE decoder": lambda: decode(student.vae, z),
    }


@torch.inference_mode()
def median_ms(run, repeats, device):
    """Median milliseconds of `repeats` runs after one that is not counted."""
    times = []
    for _ in range(1 + repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times[1:])


def synchronize(device):
    """Waits for a GPU's work; torch.device or its name."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def working_memory(run, device):
    """Peak memory of a run over what was in use before it, in MB, as text; on a CPU the process's, known on Linux only."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.0f}"
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type != "cpu" or not clear.exists():
        return "not known here"
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # freed memory goes back to the system, so that it does not count as in use
    clear.write_text("5")  # the peak starts again from the present use: proc(5)
    before = int(status.read_text().split("VmRSS:")[1].split()[0])  # kB
    run()
    return f"{(int(status.read_text().split('VmHWM:')[1].split()[0]) - before) * 1.024e-3:.0f}"


def random_models(config):
    """Student and teacher in the published sizes with random weights, for times where no published weights are at hand.

    config: load_config("paper"). The VAE, UNet and schedule are SD v1.5's, the teacher is PMRF's; LCM-LoRA would be fused, so
    it costs nothing; the LoRA of Stage B is there.
    """
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.18215,
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    clip, dino = (
        timm.create_model(entry["name"], num_classes=0, **{k: v for k, v in entry.items() if k != "name"}).eval()
        for entry in (config["clip"], config["dino"])
    )
    student = Student({**config, "lcm_lora": None}, vae, unet, clip, dino, LCMScheduler().alphas_cumprod)
    student.add_lora()
    return student.eval().requires_grad_(False), PMRF(SwinIR(**SWINIR), HDiT(**HDIT)).eval().requires_grad_(False)
