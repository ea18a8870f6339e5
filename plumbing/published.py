"""Published weights, found and read: a folder, a hub id, or the hub's cache when there is no network. Nothing is computed here.

Whatever can go wrong (no network, a cut download, another network's file) becomes one line: what was expected, how to get it.
Only safetensors are read, and PMRF's Lightning checkpoints with weights_only=True; neither can run code.
"""

import contextlib
import json
import pickle
import re
import warnings
from pathlib import Path

import timm
import torch
from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel
from diffusers.utils import is_accelerate_available
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save
from timm.models.vision_transformer import checkpoint_filter_fn

from nets.autoencoder import PCAAutoencoder
from plumbing.files import make_folder, write_bytes
from plumbing.presets import ROOT, locate

LPIPS_FEATURES = ROOT / "tiny" / "lpips_alex.safetensors"


@contextlib.contextmanager
def loading(what, name, size):
    """Inside, any error of any library becomes an OSError of one line. what, size: for the message; name: folder or hub id."""
    try:
        yield
    except Exception as e:  # huggingface_hub, safetensors, timm and diffusers each have errors of their own
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))
        remedy = f"online, run hf download {name}" if hub else "check the path, or replace that file"
        remedy = "restore that folder" if Path(locate(name)).is_dir() else remedy
        raise OSError(f"expected the {what} ({size}) at {name}, could not load it ({one_line(e)}): {remedy}") from None


def one_line(error):
    """What was wrong with a file, from whatever error it caused; of all keys that do not fit, the first and the last."""
    lines = [line.strip()[:200] for line in str(error).splitlines()] or ["nothing in it"]
    lines = dict.fromkeys((lines[1], lines[-1])) if "loading state_dict" in lines[0] else lines[:1]
    kind = "" if type(error) in (ValueError, RuntimeError) else f"{type(error).__name__}: "
    return kind + "; ".join(lines)


def fetch(name, file):
    """The path of a file in a folder, or in a hub repository: downloaded, or from the hub's cache without a network."""
    hub_logging.set_verbosity_error()  # without a network it would announce each retry
    return Path(locate(name)) / file if Path(locate(name)).is_dir() else Path(hf_hub_download(str(name), file))


# --- SD v1.5: VAE, UNet, schedule -----------------------------------------------------------------------------------------


def read(cls, config, part):
    """A frozen diffusers network, the `part` of config["base"]. ValueError if its file lacks weights; diffusers is silent."""
    # Never a pickle. Without accelerate, which is optional, diffusers makes random weights before it reads the file
    options = dict(torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=is_accelerate_available())
    module, keys = cls.from_pretrained(locate(config["base"]), subfolder=part, output_loading_info=True, **options)
    if keys["missing_keys"]:
        raise ValueError("weights that its config asks for are not in it")
    return module.eval().requires_grad_(False)


def load_vae(config):
    """The frozen VAE of config["base"]: diffusers' AutoencoderKL, or the tiny preset's own class."""
    with loading("VAE", config["base"], "vae/, 335 MB"):
        settings = AutoencoderKL.load_config(locate(config["base"]), subfolder="vae")
        own = settings.get("_class_name") == "PCAAutoencoder"
        return read(PCAAutoencoder if own else AutoencoderKL, config, "vae")


def load_unet(config):
    """The frozen UNet of config["base"], as published: LCM-LoRA is not in it yet."""
    with loading("UNet", config["base"], "unet/, 3.4 GB"):
        return read(UNet2DConditionModel, config, "unet")


def load_schedule(config):
    """alpha_bar of each timestep 0 ... 999 of config["base"], a list of floats."""
    with loading("schedule", config["base"], "scheduler/"):
        schedule = LCMScheduler.load_config(locate(config["base"]), subfolder="scheduler")
        betas = {k: schedule[k] for k in ("beta_start", "beta_end", "beta_schedule")}
        return LCMScheduler(**betas).alphas_cumprod.tolist()


# --- CLIP and DINOv2 through timm, LPIPS -----------------------------------------------------------------------------------


def load_vit(entry):
    """A frozen ViT without its head. entry: its "name" (timm's, or a local timm folder) and arguments of its class."""
    name, options = entry["name"], {key: value for key, value in entry.items() if key != "name"}
    folder = Path(locate(name)).is_dir()
    # where timm gets a model from: its name is not always the repository's
    source = name if folder else getattr(timm.models.get_pretrained_cfg(name), "hf_hub_id", None) or name
    with loading("feature backbone", source, "about 350 MB, through timm"):
        vit = timm.create_model(f"local-dir:{locate(name)}" if folder else name, num_classes=0, **options)
        state = checkpoint_filter_fn(load_file(fetch(source, "model.safetensors")), vit)
        # timm's own loader would also pass over weights that the file lacks; only a head may be left over
        if missing := vit.load_state_dict(state, strict=False).missing_keys:
            raise ValueError(f"no {missing[0]} in it, and {len(missing)} weights missing in all")
    return vit.eval().requires_grad_(False)


def load_lpips():
    """LPIPS with AlexNet features, offline: the lpips package's linear layers on the convolutions in tiny/.

    Returns a frozen lpips.LPIPS: lpips_fn(a, b, normalize=True), images (B, 3, H, W) in [0, 1] -> (B, 1, 1, 1). OSError when
    the features are missing. Source: richzhang/PerceptualSimilarity v0.1; torchvision's AlexNet in float16.
    """
    with loading("LPIPS features", "tiny", LPIPS_FEATURES.name):
        features = load_file(LPIPS_FEATURES)  # named as in torchvision, where these five of the layers are convolutions
        convolutions = [[features[f"features.{n}.{key}"] for key in ("weight", "bias")] for n in (0, 3, 6, 8, 10)]
    return lpips_of("alex", convolutions)


def lpips_of(net, convolutions):
    """A frozen lpips.LPIPS of the network "alex" or "vgg" with these convolutions, [(weight, bias), ...] in order."""
    import lpips  # imports torchvision.models: only where it is really used

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lpips_fn = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    layers = [m for m in lpips_fn.net.modules() if isinstance(m, torch.nn.Conv2d)]
    for layer, (weight, bias) in zip(layers, convolutions, strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    return lpips_fn.eval().requires_grad_(False)


# --- LoRA files ------------------------------------------------------------------------------------------------------------

LORA_KEY = re.compile(r"((?:base_model\.model\.|unet\.|lora_unet_)(.+))(\.lora[._])(A|down)\.weight")


def load_lora(name, file, unet):
    """The matrices of a LoRA's file, {layer of the UNet: (A (r, in, ...), B (out, r, ...), alpha / r)}, float32.

    Read are peft's names (with alpha and r in adapter_config.json beside it), diffusers' ("unet.", alpha = r) and kohya's
    ("lora_unet_" with underscores, an alpha a layer), linear layers and convolutions. Layers of a text encoder are left out.
    ValueError if a layer is none of the UNet's, or if there is none at all.
    """
    path = fetch(name, file)
    state, settings = load_file(path), path.with_name("adapter_config.json")
    config = json.loads(settings.read_text()) if settings.is_file() else {}
    scale = config["lora_alpha"] / config["r"] if config else 1.0
    known, layers = {n.replace(".", "_"): n for n, _ in unet.named_modules()}, {}
    for key, A in state.items():
        if found := LORA_KEY.fullmatch(key):
            stem, place, lora, half = found.groups()
            if (layer := known.get(place.replace(".", "_"))) is None:
                raise ValueError(f"{place} is no layer of this UNet")
            B, alpha = state[f"{stem}{lora}{'B' if half == 'A' else 'up'}.weight"], state.get(f"{stem}.alpha")
            layers[layer] = A.float(), B.float(), scale if alpha is None else alpha.item() / len(A)
    if not layers:
        raise ValueError("no layer of a UNet in it")
    return layers


# --- PMRF ------------------------------------------------------------------------------------------------------------------

# The published sizes, which PMRF's config.json has by name
SWINIR = dict(embed_dim=180, depths=[6] * 8, num_heads=[6] * 8)
HDIT = dict(in_channels=3, out_channels=3, patch_size=4, widths=[256, 512, 1024], depths=[2, 2, 8])
HDIT |= dict(kernel_sizes=[7, 7, None], d_head=64, mapping_width=768, mapping_depth=2)
PUBLISHED = [("swinir", "mmse_model_arch", "swinir_L", SWINIR), ("hdit", "arch", "hdit_ImageNet256Sp4", HDIT)]
PMRF_KEY = re.compile(r"model\.|mmse_model\.")  # a training checkpoint has its metrics' networks, too


def read_pmrf(name_or_folder):
    """A hub id, a folder like one, or a Lightning .ckpt -> its settings, weights {name: tensor}, averaged weights or None.

    Settings: "swinir" and "hdit" (arguments of these classes), "sigma_s", "t_eps". The average is a list in HDiT's order.
    """
    if Path(name_or_folder).suffix == ".ckpt":
        config, weights, average = read_lightning(name_or_folder)
    else:
        config = json.loads(fetch(name_or_folder, "config.json").read_text())
        weights, average = load_file(fetch(name_or_folder, "model.safetensors")), None
    if not isinstance(config, dict):
        raise ValueError(f"settings of type {type(config).__name__} instead of a dict")
    settings = {"sigma_s": float(config.get("mmse_noise_std", 0.1)), "t_eps": float(config.get("eps", 0.0))}
    for net, key, arch, known in PUBLISHED:
        if net not in config and config.get(key, arch) != arch:
            raise ValueError(f"{key} {config[key]!r} without its sizes under {net!r} (known without: {arch})")
        settings[net] = config.get(net, known)
    return settings, {k: w for k, w in weights.items() if PMRF_KEY.match(k)}, average


def fill_pmrf(pmrf, weights, average):
    """Puts the weights into a PMRF that was made on the meta device; of the flow the average, where there is one."""
    if average is not None:
        names = [f"model.{name}" for name, _ in pmrf.model.named_parameters()]
        if len(average) != len(names):
            raise ValueError(f"{len(average)} averaged parameters instead of {len(names)}")
        weights = weights | dict(zip(names, average, strict=True))
    pmrf.to_empty(device="cpu").load_state_dict(weights)
    return pmrf


def write_pmrf(folder, config, pmrf, dtype):
    """config.json and model.safetensors as published, no half files; parameters in dtype, buffers as they are."""
    config = {"arch": "hdit", "mmse_model_arch": "swinir", "stage": "flow", "conditional": False} | config
    weights = {k: b.cpu() for k, b in pmrf.state_dict().items()}  # the frequencies of time stay float32
    weights |= {k: p.detach().to("cpu", dtype).contiguous() for k, p in pmrf.named_parameters()}
    write_bytes(make_folder(folder) / "model.safetensors", save(weights, {"format": "pt"}))
    write_bytes(Path(folder) / "config.json", json.dumps(config, indent=1).encode() + b"\n")


def read_lightning(path):
    """config, weights, averaged parameters of the flow (a list in HDiT's order) from a training checkpoint."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # its own text advises to load the file without that check, which may run code
        found = re.search(r"GLOBAL (\S+)", str(e))
        raise ValueError(f"{found[1]} in it, which could run code" if found else "no file of torch.save") from None
    try:
        return ckpt["hyper_parameters"], dict(ckpt["state_dict"]), list(ckpt["ema"]["shadow_params"])
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ValueError("a file without hyper_parameters, state_dict or ema.shadow_params") from None
