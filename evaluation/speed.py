"""Time, FLOPs and memory a picture (Tab. 1, "Time"): the student's one step and its parts, the teacher's K steps, diffusers.

Every row is measured in one run on one machine: FLOPs by torch's counter (a multiplication and an addition are two), time as
the median of several runs after one that is not counted, and the share of this machine's peak that the row reaches. Peak: the
better of a large matrix product and a convolution of the VAE's shape. Time does not depend on the weights' values, so
random weights of the published sizes serve. Used by `python evaluate.py speed`.
"""

import ctypes
import statistics
import time
from functools import partial
from pathlib import Path

import timm
import torch
from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from evaluation.figures import noted
from evaluation.tables import markdown
from nets.hdit import HDiT
from nets.swinir import SwinIR
from plumbing.devices import dtype_of, synchronize
from plumbing.published import HDIT, SWINIR
from student import Student, decode, encode
from teacher import PMRF

attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch's counter knows those of GPUs alone
COUNTED = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
GRAPH, COMPILED = "replayed as a CUDA graph", "compiled"


# --- what is measured -----------------------------------------------------------------------------------------------------


def methods(student, teacher, y, steps, one_step):
    """{row: function of no argument} for the pictures y (B, 3, S, S): student, posterior mean, teacher at each K of steps.

    one_step: a single Euler step instead of the teacher, since a step costs the same wherever it starts.
    """
    eps = torch.randn_like(y)
    rows = {"student, 1 step": lambda: student(y), "posterior mean": lambda: teacher.posterior_mean(y)}
    if one_step:
        return rows | {"one Euler step": lambda: teacher.velocity(y, 0.0)}
    for k in steps:
        rows[f"teacher, {k} step{'s' * (k > 1)}"] = lambda k=k: teacher.transport(teacher.posterior_mean(y), eps, k)
    return rows


def parts(student, y):
    """{part: function that runs it alone}; the arguments of the inner ones are noted in one real step."""
    with noted(student.visual_encoder, student.spatial_encoder, student.unet) as calls, torch.inference_mode():
        z = student.step(encode(student.vae, y), y)
    visual_encoder, spatial_encoder, unet = (partial(network, *args, **kwargs) for network, args, kwargs, _ in calls)
    return {
        "- VAE encoder": lambda: encode(student.vae, y),
        "- CLIP and DINOv2": lambda: student.features(y),
        "- visual encoder": visual_encoder,
        "- spatial encoder": spatial_encoder,
        "- UNet": unet,
        "- VAE decoder": lambda: decode(student.vae, z),
    }


def pipeline(student, y):
    """{row: function}: diffusers' ControlNet pipeline with its LCM scheduler, from the student's own networks.

    It starts from noise and sees y through the ControlNet alone: no VAE encoder, no CLIP, no DINOv2; its context is given. No
    rows for the tiny preset, whose autoencoder it does not take.
    """
    if not isinstance(student.vae, AutoencoderKL):
        return {}
    from diffusers import StableDiffusionControlNetPipeline  # imports transformers

    pipe = StableDiffusionControlNetPipeline(
        vae=student.vae, text_encoder=None, tokenizer=None, unet=student.unet, controlnet=student.spatial_encoder,
        scheduler=LCMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        c = student.context(y)
    run = partial(pipe, image=y, prompt_embeds=c, guidance_scale=1.0, output_type="pt", generator=torch.Generator())
    return {f"diffusers' pipeline, {k} step{'s' * (k > 1)}": partial(run, num_inference_steps=k) for k in (1, 4)}


def peaks(device, dtype):
    """TFLOP/s of this machine in dtype: a large matrix product, and a 3 x 3 convolution of 256 channels at the VAE's 256 px."""
    n, batch, repeats = (8192, 8, 10) if device.type == "cuda" else (2048, 1, 3)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(batch, 256, 256, 256, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(256, 256, 3, padding=1, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    work = {"matrix product": (lambda: a @ b, 2 * n**3), "convolution": (lambda: conv(x), 18 * 256 * x.numel())}
    return {name: flop / median_ms(run, repeats, device) / 1e9 for name, (run, flop) in work.items()}


# --- the table ------------------------------------------------------------------------------------------------------------


def table(student, teacher, size, device, batches, steps, repeats, one_step=False, compiled=False):
    """All that is measured as Markdown, with notes below; student and teacher stand on `device`, in one precision.

    batches: pictures at once, of each a block of rows; the parts and the pipeline with the first alone. compiled: torch.compile
    too (minutes). On a GPU also each row as a CUDA graph, which shows what launching its kernels one by one costs.
    """
    peak, rows, first = peaks(device, dtype_of(student)), [], {}
    ways = [""] + [GRAPH] * (device.type == "cuda") + [COMPILED] * compiled
    for batch in batches:
        y = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        work = methods(student, teacher, y, steps, one_step)
        if batch == batches[0]:
            work |= parts(student, y) | pipeline(student, y)
        for name, run in work.items():
            for way in ways:
                if way and (name.startswith("diffusers") or (way == COMPILED and name.startswith(("- ", "teacher")))):
                    continue  # the pipeline waits for the GPU in between; the teacher's steps would each be compiled anew
                row = measure(run, way, repeats, device, batch)
                first.setdefault(name, row)
                times = row["ms"] / first["student, 1 step"]["ms"]
                share = row["tflop"] / row["ms"] * 1e3 / max(peak.values())
                cells = [f"{row['tflop']:.3g}", f"{row['ms']:.1f}", f"{times:.2f}", f"{100 * share:.0f} %"]
                rows.append([name, batch, way or "eager", *cells, row["memory"], f"{row['prepared']:.1f}"])
    header = ["", "batch", "run", "TFLOP a face", "ms a face", "times the student", "share of the peak"]
    header += ["memory beyond the weights, MB", "seconds to prepare"]
    return markdown(header, rows) + "\n" + "\n".join(notes(peak, first, steps, one_step)) + "\n"


def notes(peak, first, steps, one_step):
    """Lines under the table: the peak, and how teacher and student compare in time and in FLOPs beside the paper."""
    lines = ["Peak, TFLOP/s: " + ", ".join(f"{name} {value:.3g}" for name, value in peak.items())]
    student, mean = first["student, 1 step"], first["posterior mean"]
    for k in steps:
        if one_step:
            teacher = {key: mean[key] + k * first["one Euler step"][key] for key in ("ms", "tflop")}
        else:
            teacher = first[f"teacher, {k} step{'s' * (k > 1)}"]
        ratios = [teacher[key] / student[key] for key in ("ms", "tflop")]
        line = f"Teacher, {k} steps{' (computed)' * one_step}: {teacher['ms']:.0f} ms, "
        line += f"{ratios[0]:.2f} times the student's time, {ratios[1]:.2f} times its FLOPs"
        lines.append(line + " (the paper's Tab. 1: 7.5 times)" * (k == 25))
    return lines


# --- measuring ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(run, way, repeats, device, batch):
    """A dict of tflop and ms a face, memory, and the seconds that the preparation took."""
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        run()
    synchronize(device)
    start = time.perf_counter()
    if way == GRAPH:
        run = as_graph(run)
    if way == COMPILED:
        run = torch.compile(run, mode="reduce-overhead" if device.type == "cuda" else "default")
    if way:
        run(), run(), run()  # compiled at the first, recorded as a graph at the second
    synchronize(device)
    prepared = time.perf_counter() - start
    memory = working_memory(run, device)
    tflop = counter.get_total_flops() / batch / 1e12
    return dict(tflop=tflop, ms=median_ms(run, repeats, device) / batch, memory=memory, prepared=prepared)


def as_graph(run):
    """The kernels of one run, recorded: launching them is then one call. The inputs stay what they were."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(), run()  # what is made once must be there before
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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


def random_models(config, device):
    """Student and teacher in the published sizes with random weights, made on the device, float32.

    config: load_config("paper"). The VAE, UNet and schedule are SD v1.5's, the teacher is PMRF's. LCM-LoRA and Stage B's LoRA
    are merged into the weights when a student is loaded, so they cost nothing.
    """
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.18215,
        )  # fmt: skip
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        entries = [dict(config[part]) for part in ("clip", "dino")]
        clip, dino = (timm.create_model(entry.pop("name"), num_classes=0, **entry) for entry in entries)
        student = Student(config, vae, unet, clip, dino, LCMScheduler().alphas_cumprod.tolist())
        return student, PMRF(SwinIR(**SWINIR), HDiT(**HDIT)).eval()
