"""Published weights through the hub's own cache, offline: small random files under the published names and layouts."""

import json
import logging
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import cache
import restore
import train
from plumbing import pictures, published
from plumbing.presets import PRESETS, load_config
from student import Student
from teacher import PMRF

PAPER = PRESETS["paper"]
SMALL_VIT = {"img_size": 32, "embed_dim": 96, "depth": 1, "num_heads": 2}
REPOSITORIES = {  # what the preset names -> where its files are on the hub
    "base": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "lcm_lora": "latent-consistency/lcm-lora-sdv1-5",
    "teacher": "ohayonguy/PMRF_blind_face_image_restoration",
    "clip": "timm/vit_base_patch16_clip_224.openai",
    "dino": "timm/vit_base_patch14_dinov2.lvd142m",
}


def test_the_paper_preset_value_by_value():
    """Each value, from the section or the public code that gives it."""
    assert PAPER == {
        "preset": "paper",
        "image_size": 512,  # Sec. 4, Datasets
        "teacher": "ohayonguy/PMRF_blind_face_image_restoration",  # Sec. 4: "the pre-trained PMRF"
        "base": "stable-diffusion-v1-5/stable-diffusion-v1-5",  # Sec. 4: SD v1.5
        "lcm_lora": "latent-consistency/lcm-lora-sdv1-5",  # Sec. 3: a latent consistency student; cites LCM-LoRA
        "clip": {
            "name": "vit_base_patch16_clip_quickgelu_224.openai"
        },  # InterLCM: OpenAI's ViT-B/16, trained with QuickGELU
        "dino": {"name": "vit_base_patch14_dinov2.lvd142m", "img_size": PAPER["dino"]["img_size"]},  # Sec. 4: ViT-B/14
        "visual_encoder": {"nf": 64, "emb_dim": 197, "ch_mult": [2, 4, 8], "res_blocks": 2},  # InterLCM
        "condition_channels": [16, 32, 96, 256],  # diffusers' ControlNetModel
        "adapter": "zero-linear",  # Sec. 3.3.1
        "timestep": 499,  # InterLCM, one step
        "entry": PAPER["entry"],
        "lora_rank": 32,  # Sec. 4
        "lr": 2e-5,  # Sec. 4
    }
    assert PAPER["dino"]["img_size"] == 518 and PAPER["entry"] == "mean"  # measured: docs/choices.md


def put(hub, repository, source):
    """The files of a folder as the hub's cache holds a repository: blobs by hash, links in a snapshot, a ref to it."""
    root, commit = hub / ("models--" + repository.replace("/", "--")), "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "blobs").mkdir()
    for i, file in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        link = root / "snapshots" / commit / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        (root / "blobs" / f"{i:064x}").write_bytes(file.read_bytes())
        link.symlink_to(root / "blobs" / f"{i:064x}")


@pytest.fixture(scope="module")
def hub(small_config, tmp_path_factory):
    """A full cache of the hub, and the folder of a preset that names its repositories as `paper` does."""
    root = tmp_path_factory.mktemp("hub")
    vits = {}
    for part in ("clip", "dino"):
        torch.manual_seed(1)
        vits[part] = timm.create_model(PAPER[part]["name"], num_classes=0, **SMALL_VIT)
        (root / part).mkdir()
        state = vits[part].state_dict() | {"head.weight": torch.zeros(3, 96), "head.bias": torch.zeros(3)}
        save_file(state, root / part / "model.safetensors")  # with a head, as published
        put(root / "cache", REPOSITORIES[part], root / part)
    (root / "lcm").mkdir()
    key = "lora_unet_mid_block_attentions_0_proj_in"
    down, up = torch.ones(4, 64, 1, 1), torch.full((64, 4, 1, 1), 0.01)
    lora = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(8.0)}
    save_file(lora, root / "lcm" / "pytorch_lora_weights.safetensors")
    put(root / "cache", REPOSITORIES["base"], Path(small_config["base"]))
    put(root / "cache", REPOSITORIES["lcm_lora"], root / "lcm")
    put(root / "cache", REPOSITORIES["teacher"], Path(small_config["teacher"]))
    names = {k: PAPER[k] for k in ("base", "lcm_lora", "teacher")}
    names |= {k: {"name": PAPER[k]["name"], **SMALL_VIT} for k in ("clip", "dino")}
    tokens = 1 + (SMALL_VIT["img_size"] // 16) ** 2
    config = small_config | names | {"preset": str(root / "preset"), "stage": "published"}
    config["visual_encoder"] = config["visual_encoder"] | {"emb_dim": tokens}
    (root / "preset").mkdir()
    (root / "preset" / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(autouse=True)
def offline(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub / "cache"))


def test_every_published_part_loads_offline_from_the_hubs_cache(hub, small_config):
    config = load_config(hub / "preset")
    student, pmrf = Student.from_published(config), PMRF.from_pretrained(config["teacher"])
    plain = published.load_unet(small_config).state_dict()
    layer = "mid_block.attentions.0.proj_in.weight"
    assert torch.allclose(student.unet.state_dict()[layer], plain[layer] + 8 / 4 * 4 * 0.01, atol=1e-6)  # LCM-LoRA
    assert torch.equal(student.spatial_encoder.state_dict()[layer], plain[layer])  # copied before it
    for part in ("clip", "dino"):
        file = load_file(hub / part / "model.safetensors")
        assert all(torch.equal(v, file[k]) for k, v in getattr(student, part).state_dict().items())
    ours = PMRF.from_pretrained(small_config["teacher"]).state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in pmrf.state_dict().items())


def test_the_offline_pass_both_stages_and_a_restoration_from_the_hubs_cache(hub, tmp_path, monkeypatch):
    """cache.py, a step of each stage and restore.py, all with the published names and no network."""
    (tmp_path / "faces").mkdir()
    for i in range(2):
        pictures.write_image(tmp_path / "faces" / f"{i}.png", torch.rand(3, 64, 64))
    monkeypatch.setitem(PRESETS, "tiny", load_config(hub / "preset"))  # cache.py takes the presets' own names alone
    monkeypatch.setitem(PRESETS["tiny"], "preset", "tiny")
    made = cache.work(
        cache.parse_args(
            ["--data", f"{tmp_path}/faces", "--out", f"{tmp_path}/cache", "--steps", "1", "--device", "cpu"]
        )
    )
    a, b = tmp_path / "a", tmp_path / "b"
    common = ["--cache", f"{tmp_path}/cache", "--batch", "2", "--steps", "1", "--sgcl-every", "1", "--out"]
    stage_a = train.main(train.parse_args(["--stage", "A", *common, str(a)]))
    stage_b = train.main(train.parse_args(["--stage", "B", "--init", str(a), *common, str(b)]))
    picture, out = tmp_path / "faces" / "0.png", tmp_path / "out"
    argv = [str(picture), "--checkpoint", str(b), "-o", str(out), "--device", "cpu"]
    assert (made, stage_a, stage_b, restore.main(restore.parse_args(argv))) == (0, 0, 0, 0)
    assert pictures.read_image(out / "0_restored.png").shape == (3, 64, 64)


def test_presets_name_repositories_that_exist():
    for part in ("base", "lcm_lora", "teacher"):
        assert PAPER[part] == REPOSITORIES[part]


def test_what_is_not_in_the_cache_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for part, load in (("base", published.load_unet), ("base", published.load_vae), ("base", published.load_schedule)):
        with pytest.raises(OSError, match=f"hf download {PAPER[part]}") as e:
            load(PAPER)
        assert "\n" not in str(e.value)
    for part in ("clip", "dino"):  # timm's name of a model is not always the repository's
        with pytest.raises(OSError, match=f"hf download {REPOSITORIES[part]}"):
            published.load_vit(PAPER[part] | SMALL_VIT)
    with pytest.raises(OSError, match=f"hf download {REPOSITORIES['teacher']}"):
        PMRF.from_pretrained(PAPER["teacher"])
    assert huggingface_hub.logging.get_verbosity() >= logging.ERROR  # online, its retries would be twelve lines


def test_a_vit_file_without_some_weights_is_refused(hub, tmp_path):
    """timm would take it, since the head is left out anyway."""
    state = load_file(hub / "clip" / "model.safetensors")
    (tmp_path / "vit").mkdir()
    save_file({k: v for k, v in state.items() if "attn" not in k}, tmp_path / "vit" / "model.safetensors")
    config = {"architecture": "vit_base_patch16_clip_quickgelu_224", "num_classes": 0, "model_args": SMALL_VIT}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"num_classes": 0}}))
    with pytest.raises(OSError, match=r"blocks\.0\.attn") as e:
        published.load_vit({"name": str(tmp_path / "vit")})
    assert "\n" not in str(e.value)
