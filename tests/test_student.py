"""student.py against diffusers' own scheduler and loaders, the published sizes, and the paper's identities (Eq. 5)."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import timm
import torch
import torchvision.transforms.functional as transforms
from diffusers import AutoencoderKL, ControlNetModel, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torchvision.transforms import InterpolationMode

import student
from adapter import SemanticAdapter
from plumbing import presets
from plumbing.presets import PRESETS, ROOT, locate
from student import LORA_TARGETS, Student

SD_UNET = {  # SD v1.5's unet/config.json: these sizes make its 859,520,964 parameters
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
SD_VAE = {  # SD v1.5's vae/config.json
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.fixture(scope="module")
def small(small_config):
    torch.manual_seed(1)
    net = Student.from_published(small_config)
    moved(net.spatial_encoder)  # away from its zero convolutions, which would hide how it is wired
    return net


@pytest.fixture
def y():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def moved(module, scale=0.05):
    """Random numbers on every parameter, so that no zero-initialised layer hides a fault."""
    g = torch.Generator().manual_seed(3)
    for p in module.parameters():
        p.data += scale * torch.randn(p.shape, generator=g)
    return module


def test_eq5_boundary_scalings_are_those_of_lcm():
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for tau in (0, 1, 19, 499, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(tau))
        assert student.boundary_scalings(tau) == pytest.approx([float(e) for e in expected], rel=1e-6)
    assert student.boundary_scalings(0) == (1.0, 0.0)
    assert student.boundary_scalings(499)[0] < 2e-8


def test_eq5_x0_inverts_the_forward_noising():
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    z, eps = torch.randn(2, 2, 4, 8, 8)
    z_t = scheduler.add_noise(z, eps, torch.tensor([499, 499]))
    x_0 = student.x0_from_eps(z_t, eps, float(scheduler.alphas_cumprod[499]))
    assert torch.allclose(x_0, z, atol=1e-5)


@pytest.mark.parametrize("entry", presets.ENTRIES)
def test_eq5_one_step_is_one_lcm_scheduler_step(small, y, entry):
    """From each entry: z_tau is what the scheduler's forward process makes of z_y, z what its one step at 499 makes of eps."""
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", original_inference_steps=50
    )
    scheduler.set_timesteps(1)
    scheduler.timesteps = torch.tensor([499])
    small.config["entry"] = entry
    with torch.no_grad():
        z_y = student.encode(small.vae, y)
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
        noise = {"mean": torch.zeros_like(z_y), "noised": noise}.get(entry)
        z_tau = z_y if entry == "clean" else scheduler.add_noise(z_y, noise, torch.tensor([499]))
        c = small.context(y)
        down, mid = small.spatial_encoder(z_tau, 499, c, controlnet_cond=y, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        eps = small.unet(z_tau, 499, encoder_hidden_states=c, **residuals).sample
        expected = scheduler.step(eps, 499, z_tau).denoised
        assert torch.allclose(small.step(z_y, y), expected, atol=1e-5)
        assert all(r.abs().mean() > 1e-3 for r in (*down, mid))
        x = student.decode(small.vae, expected)
        assert x.min() < 0 or x.max() > 1
        assert torch.allclose(small(y), x, atol=1e-5)  # not clipped: colour correction comes first


def test_eq5_identity_at_tau_zero(small, y):
    """Self-consistency: at tau = 0 the step returns its input, whatever the network says."""
    z_y, small.config["entry"] = torch.randn(2, 4, 8, 8), "clean"
    with torch.no_grad():
        assert torch.equal(small.step(z_y, y, tau=0), z_y)
        assert not torch.allclose(small.step(z_y, y), z_y)


def test_sec32_latent_bridge_is_the_scaled_posterior_mean(small, y):
    with torch.no_grad():
        moments = small.vae.quant_conv(small.vae.encoder(2 * y - 1))
        z = student.encode(small.vae, y)
        assert torch.allclose(z, 0.18215 * moments[:, :4], atol=1e-6)
        assert torch.equal(z, student.encode(small.vae, y))  # no sampling
        x = small.vae.decode(z / 0.18215).sample
        assert torch.allclose(student.decode(small.vae, z), x / 2 + 0.5, atol=1e-6)


def test_sec331_adapter_at_zero_changes_no_bit(small_config, y):
    torch.manual_seed(1)
    with_adapter = Student.from_published(small_config)
    torch.manual_seed(1)
    without = Student.from_published(small_config | {"adapter": "none"})
    without.visual_encoder.load_state_dict(with_adapter.visual_encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(with_adapter(y), without(y))
        moved(with_adapter.adapter)
        assert not torch.equal(with_adapter(y), without(y))


def test_sec331_context_is_clip_plus_the_broadcast_degradation_token(small, y):
    adapter = moved(SemanticAdapter(96, 96))
    with torch.no_grad():
        tokens, e_dino = small.features(y)
        expected = small.visual_encoder(tokens) + (e_dino @ adapter.linear.weight.T + adapter.linear.bias)[:, None]
        kept, small.adapter = small.adapter, adapter
        got = small.context(y)
        small.adapter = kept
        assert got.shape == (2, 77, 96)
        assert torch.allclose(got, expected, atol=1e-5)
        assert torch.allclose(tokens, small.clip.forward_features(as_timm_does(small.clip, y)), atol=1e-5)
        assert torch.allclose(e_dino, small.dino.forward_features(as_timm_does(small.dino, y))[:, 0], atol=1e-5)


def as_timm_does(vit, y):
    """A backbone's own input, by torchvision: antialiased bicubic to its size, then its mean and standard deviation."""
    size, cfg = list(vit.patch_embed.img_size), vit.pretrained_cfg
    assert size != list(y.shape[-2:]) and cfg["mean"] != cfg["std"]
    y = transforms.resize(y, size, InterpolationMode.BICUBIC, antialias=True)
    return transforms.normalize(y, cfg["mean"], cfg["std"])


def test_sec332_lora_sits_on_cross_attention_and_feed_forward_alone():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD_UNET)
        lora = peft.get_peft_model(unet, peft.LoraConfig(r=32, lora_alpha=32, target_modules=LORA_TARGETS))
    names = [n for n, m in lora.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(names) == 16 * 6  # 16 transformer blocks, 4 linear layers of cross-attention, 2 of the feed-forward
    suffixes = {"attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"}
    assert {next(s for s in suffixes if n.endswith(s)) for n in names} == suffixes
    assert not [n for n in names if "attn1" in n or "conv" in n]
    assert all(p.requires_grad == ("lora_" in n) for n, p in lora.named_parameters())


def test_sec332_lora_at_its_start_changes_no_bit(small_config, y):
    torch.manual_seed(1)
    net = Student.from_published(small_config)
    moved(net.spatial_encoder)
    with torch.no_grad():
        before = net(y)
        net.add_lora()
        assert torch.equal(net(y), before)
        for n, p in net.unet.named_parameters():
            if "lora_B" in n:
                p += 0.1
        assert not torch.equal(net(y), before)
        layer, x = (
            net.unet.get_submodule("base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"),
            y[0, 0],
        )
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(layer(x) - layer.base_layer(x), x @ a.T @ b.T, atol=1e-5)  # alpha = r: scale 1


def test_sec332_a_merged_lora_is_what_peft_merges(small_config, tmp_path):
    """With alpha = 2 r, so that a scale that is left out shows."""
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS)
    unet = peft.get_peft_model(student.load_unet(small_config), lora)
    moved(unet, 0.1)
    unet.save_pretrained(tmp_path)
    ours = {
        k.replace(".base_layer", ""): v.clone()
        for k, v in unet.get_base_model().state_dict().items()
        if "lora_" not in k
    }
    bare = student.load_unet(small_config)
    bare.load_state_dict(ours)
    layers = student.load_lora(tmp_path, "adapter_model.safetensors", bare)
    assert {scale for _, _, scale in layers.values()} == {2.0}
    merged, expected = student.merge_lora(bare, layers).state_dict(), unet.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[k], expected[k], atol=1e-6) for k in merged)
    assert any(not torch.allclose(merged[k], ours[k], atol=1e-3) for k in merged)


def test_sec332_a_checkpoint_restores_the_same_picture_merged_and_as_layers(small_config, tmp_path, y):
    net = Student.from_published(small_config)
    net.set_stage("B")
    for name, p in net.unet.named_parameters():
        if "lora_B" in name:
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    net.save(tmp_path / "c", stage="B")
    layers, merged = Student.load(tmp_path / "c"), Student.load(tmp_path / "c", merge=True)
    assert layers.has_lora and not merged.has_lora and not [n for n, _ in merged.named_parameters() if "lora_" in n]
    with torch.no_grad():
        assert (layers(y) - merged(y)).abs().max() < 1 / 255
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    plain = student.load_unet(small_config).state_dict()
    assert (merged.unet.state_dict()[layer] - plain[layer]).abs().max() > 1e-3
    file = tmp_path / "c" / "lora" / "adapter_model.safetensors"
    lora = load_file(file)
    save_file({k: v for k, v in lora.items() if "ff.net.2" not in k}, file)
    for merge in (True, False):
        with pytest.raises(OSError, match="other layers"):
            Student.load(tmp_path / "c", merge=merge)


def test_sec4_what_each_stage_trains(small_config):
    net = Student.from_published(small_config)
    a = net.set_stage("A")
    assert {n.split(".")[0] for n in a} == {"visual_encoder", "spatial_encoder", "adapter"}
    assert len(a) == sum(
        len(list(getattr(net, m).parameters())) for m in ("visual_encoder", "spatial_encoder", "adapter")
    )
    b = net.set_stage("B")
    assert {n.split(".")[0] for n in b} == {"unet", "adapter"}
    assert all("lora_" in n for n in b if n.startswith("unet"))
    assert not [n for n, p in net.named_parameters() if p.requires_grad and n not in b]
    assert not [n for n, _ in net.spatial_encoder.named_modules() if "lora" in n]


def test_published_sizes():
    """The table of parameters in docs/choices.md; the visual encoder's keys are checked in test_visual_encoder.py."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD_UNET)
        spatial = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        visual = student.VisualEncoder(**PRESETS["paper"]["visual_encoder"])
        adapter = SemanticAdapter()
        vae = AutoencoderKL(**SD_VAE)
        vits = [dict(PRESETS["paper"][part]) for part in ("clip", "dino")]
        clip, dino = (timm.create_model(entry.pop("name"), num_classes=0, **entry) for entry in vits)
    assert count(unet.parameters()) == 859_520_964
    assert count(spatial.parameters()) == 361_279_120
    assert count(visual.parameters()) == 12_960_845
    assert count(adapter.parameters()) == 590_592
    assert count(vae.parameters()) == 83_653_863
    assert count(clip.parameters()) == 85_799_424
    assert count(dino.parameters()) == 86_579_712
    with torch.device("meta"):
        r = PRESETS["paper"]["lora_rank"]
        lora = peft.get_peft_model(unet, peft.LoraConfig(r=r, lora_alpha=r, target_modules=LORA_TARGETS))
    assert count(p for n, p in lora.named_parameters() if "lora_" in n) == 8_773_632


LCM_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
              "conv1", "conv2", "conv_shortcut", "time_emb_proj", "0.conv")  # fmt: skip  # those of the published LCM-LoRA


def write_lcm_lora(folder, before, layout="kohya"):
    """Random LCM-LoRA for a UNet's state dict `before`. Returns {layer: weight after fusing}, W + (alpha / r) up down."""
    g = torch.Generator().manual_seed(5)
    layers = {k.removesuffix(".weight") for k in before if k.removesuffix(".weight").endswith(LCM_LAYERS)}
    assert len(layers) > 60 and {next(s for s in LCM_LAYERS if n.endswith(s)) for n in layers} == set(LCM_LAYERS)
    r, alpha, tensors, expected = 4, 8.0, {}, {}
    for name in sorted(layers):
        w = before[f"{name}.weight"]
        down = 0.1 * torch.randn(r, *w.shape[1:], generator=g)
        up = 0.1 * torch.randn(w.shape[0], r, *[1] * (w.ndim - 2), generator=g)
        delta = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(w.shape)
        expected[name] = w + (alpha / r if layout == "kohya" else 1.0) * delta
        if layout == "kohya":
            key = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        else:
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "pytorch_lora_weights.safetensors")
    return expected


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_lcm_lora_is_fused_from_both_layouts(small_config, tmp_path, layout):
    """In every attention, feed-forward and convolution that the published file covers, and nowhere else."""
    unet = student.load_unet(small_config)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    expected = write_lcm_lora(tmp_path, before, layout)
    fused = student.merge_lora(unet, student.load_lora(str(tmp_path), "pytorch_lora_weights.safetensors", unet))
    after = fused.state_dict()
    assert set(after) == set(before)  # no layer of peft is left
    for name, w in expected.items():
        assert torch.allclose(after[f"{name}.weight"], w, atol=1e-5)
    rest = [k for k in before if k.removesuffix(".weight") not in expected]
    assert all(torch.equal(after[k], before[k]) for k in rest)
    assert not [n for n, p in fused.named_parameters() if p.requires_grad]


def test_an_lcm_lora_of_another_network_is_refused(small_config, tmp_path):
    """Were its keys passed over, the base would be no consistency model, without a word."""
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{key}.lora_down.weight": torch.zeros(4, 8), f"{key}.lora_up.weight": torch.zeros(8, 4)}
    tensors[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(OSError, match="LCM-LoRA.*no layer of a UNet") as e:
        Student.from_published(small_config | {"lcm_lora": str(tmp_path)})
    assert "\n" not in str(e.value)


def test_pickles_are_not_read(small_config, tmp_path):
    """A folder with diffusion_pytorch_model.bin alone, which diffusers would read."""
    base = tmp_path / "base"
    shutil.copytree(small_config["base"], base)
    for part in ("unet", "vae"):
        weights = base / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    for load in (student.load_unet, student.load_vae):
        with pytest.raises(OSError, match="safetensors"):
            load(small_config | {"base": str(base)})


def test_spatial_encoder_copies_the_unet_before_lcm_lora(small_config, tmp_path):
    before = student.load_unet(small_config).state_dict()
    expected = write_lcm_lora(tmp_path / "lcm", before)
    net = Student.from_published(small_config | {"lcm_lora": str(tmp_path / "lcm")})
    copied = net.spatial_encoder.state_dict()
    shared = [k for k in before if k in copied]
    assert len(shared) > 60 and all(torch.equal(copied[k], before[k]) for k in shared)
    key = "mid_block.resnets.0.conv1"
    assert torch.allclose(net.unet.state_dict()[f"{key}.weight"], expected[key], atol=1e-5)
    assert not net.spatial_encoder.controlnet_mid_block.weight.any()


def test_checkpoint_returns_the_same_student_and_opens_elsewhere(small_config, tmp_path, y):
    net = Student.from_published(small_config)
    net.set_stage("B")
    for part in (net.spatial_encoder, net.visual_encoder, net.adapter):
        moved(part, 0.02)
    for n, p in net.unet.named_parameters():
        if "lora_B" in n:
            p.data += 0.02
    net.save(tmp_path / "c", stage="B", step=7)
    again = Student.load(tmp_path / "c")
    with torch.no_grad():
        assert torch.equal(net(y), again(y))
    assert again.config["step"] == 7
    assert sorted(p.suffix for p in (tmp_path / "c").rglob("*") if p.is_file()) == [".json"] * 3 + [".safetensors"] * 4
    spatial = ControlNetModel.from_pretrained(tmp_path / "c" / "spatial_encoder")
    assert torch.equal(spatial.conv_in.weight, net.spatial_encoder.conv_in.weight)
    lora = peft.PeftModel.from_pretrained(student.load_unet(small_config), tmp_path / "c" / "lora")
    ours = {k: v for k, v in net.unet.state_dict().items() if "lora_B" in k}
    assert ours and all(torch.equal(lora.state_dict()[k], v) for k, v in ours.items())


def test_checkpoints_that_are_no_checkpoints(small_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="found none"):
        student.load_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="DirectFlow checkpoint"):
        student.load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        student.load_config(tmp_path)
    Student.from_published(small_config).save(tmp_path / "c", stage="A")
    weights = tmp_path / "c" / "visual_encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="student's weights") as e:
        Student.load(tmp_path / "c")
    assert "\n" not in str(e.value)


def test_missing_published_parts_are_named_in_one_line(small_config, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(small_config["base"], base)
    shutil.rmtree(base / "vae")
    with pytest.raises(OSError, match="VAE") as e:
        Student.from_published(small_config | {"base": str(base)})
    assert "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="tiny/none in this repository, it is missing: restore it"):
        locate("tiny/none")  # not asked of the hub
    with pytest.raises(OSError, match="hf download") as e:  # the hub's name, with no network
        student.load_unet(student.load_config("paper"))
    assert "stable-diffusion-v1-5" in str(e.value) and "3.4 GB" in str(e.value) and "\n" not in str(e.value)


def test_foreign_configs_of_published_parts_are_one_line(small_config, tmp_path):
    """A schedule without betas; a VAE whose weights are another network's, or only some of those that its config asks for."""
    vae = json.loads((Path(small_config["base"]) / "vae" / "config.json").read_text())
    for part, file, config in (
        ("scheduler", "scheduler_config.json", {"_class_name": "DDIMScheduler"}),
        ("vae", "config.json", vae | {"block_out_channels": [32] * 4}),
        ("vae", "config.json", vae | {"layers_per_block": vae["layers_per_block"] + 1}),
    ):
        base = tmp_path / f"{part}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(small_config["base"], base)
        (base / part / file).write_text(json.dumps(config))
        with pytest.raises(OSError, match="restore that folder") as e:
            Student.from_published(small_config | {"base": str(base)})
        assert "\n" not in str(e.value)


def test_tiny_preset_is_the_same_classes(y):
    net = Student.load("tiny")
    kinds = (UNet2DConditionModel, ControlNetModel, student.VisualEncoder, SemanticAdapter)
    assert tuple(map(type, (net.unet.get_base_model(), net.spatial_encoder, net.visual_encoder, net.adapter))) == kinds
    assert not isinstance(net.vae, AutoencoderKL)  # the one exception, tiny/autoencoder.py
    assert net.config["preset"] == "tiny" and net.image_size == PRESETS["tiny"]["image_size"]
    assert json.loads((ROOT / "tiny" / "student" / "config.json").read_text())["stage"] == "B"
    assert load_file(ROOT / "tiny" / "student" / "adapter.safetensors")["linear.weight"].abs().sum() > 0
