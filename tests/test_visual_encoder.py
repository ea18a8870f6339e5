"""The visual encoder at its published size against numbers of InterLCM's public code: keys, shapes, output."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from plumbing.presets import PRESETS
from student import VisualEncoder

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def published():
    return VisualEncoder(**PRESETS["paper"]["visual_encoder"]).eval()


def hash_fill(module):
    """Weights that any program can make: a 64-bit mixing function of the key's rank and the flat index, in [-1, 1]."""
    for k, (key, p) in enumerate(sorted(module.state_dict().items())):
        with np.errstate(over="ignore"):
            u64 = np.uint64
            z = np.arange(1, p.numel() + 1, dtype=u64) * u64(0x9E3779B97F4A7C15) + u64(k + 1) * u64(0xD1B54A32D192ED03)
            z = (z ^ (z >> u64(30))) * u64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> u64(27))) * u64(0x94D049BB133111EB)
            z ^= z >> u64(31)
        c = 2 * ((z >> u64(40)).astype(np.float64) / 2**24) - 1
        if p.ndim >= 2:
            c = c * np.sqrt(3 / np.prod(p.shape[1:]))
        else:
            c = 1 + 0.1 * c if key.endswith("weight") else 0.05 * c
        p.copy_(torch.from_numpy(c.astype(np.float32)).view(p.shape))


def test_sec331_published_keys_and_shapes(published):
    expected = json.loads((GOLDEN / "visual_encoder_keys.json").read_text())
    assert {k: list(v.shape) for k, v in published.state_dict().items()} == expected
    assert sum(p.numel() for p in published.parameters()) == 12_960_845


def test_sec331_output_equals_the_public_code(published):
    golden = load_file(GOLDEN / "visual_encoder_full.safetensors")
    with torch.no_grad():
        hash_fill(published)
        for key in [k for k in golden if k.startswith("probe.")]:
            filled = published.state_dict()[key.removeprefix("probe.")].flatten()[:8]
            assert torch.equal(filled, golden[key].flatten())
        assert (published(golden["x"]) - golden["out"]).abs().max() < 1e-4


def test_small_preset_keeps_the_width_of_its_tokens():
    tiny = VisualEncoder(**PRESETS["tiny"]["visual_encoder"])
    assert tiny(torch.randn(2, 65, 128)).shape == (2, 77, 128)
