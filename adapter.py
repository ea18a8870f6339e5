"""The semantic adapter (paper Sec. 3.3.1): one token of a frozen DINOv2 tells the UNet how the picture was degraded.

    (1) feature extraction          e_dino = DINOv2(Y), the class token, (B, 768)
    (2) zero-initialised projection Z(e_dino) = W e_dino + b, W = 0 and b = 0 at the start
    (3) additive injection          c = visual_encoder(CLIP(Y)) + Z(e_dino), broadcast over the 77 tokens

At the start Z gives zeros, so the student begins exactly as it was. It still learns: the gradient of W is (dL/dc) e_dino^T,
and e_dino is not zero. The ablation of Tab. 3 puts a scalar gate on an ordinary linear layer instead, g W e_dino with g = 0.
That also starts without effect, but W gets no gradient until g has moved. If W were zero too, neither would ever move.
"""

import torch
import torch.nn as nn

from plumbing.presets import ADAPTERS


class SemanticAdapter(nn.Module):
    """Z of Sec. 3.3.1: (B, dim) degradation token -> (B, 1, context_dim), to be added to the context.

    kind: "zero-linear" (the paper's), "scalar-gate" (a linear layer behind one gate that starts at zero) or "none"
    (adds zeros, has no parameters). At DINOv2 ViT-B's 768 and SD v1.5's 768 the zero linear has 590,592 parameters.
    ValueError for another kind.
    """

    def __init__(self, dim=768, context_dim=768, kind="zero-linear"):
        super().__init__()
        if kind not in ADAPTERS:
            raise ValueError(f"expected an adapter of kind {', '.join(ADAPTERS)}, got {kind!r}")
        self.kind = kind
        if kind != "none":
            self.linear = nn.Linear(dim, context_dim)
        if kind == "zero-linear":
            nn.init.zeros_(self.linear.weight)  # W(0) = 0
            nn.init.zeros_(self.linear.bias)  # b(0) = 0
        if kind == "scalar-gate":
            self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, e_dino):
        if self.kind == "none":
            return e_dino.new_zeros(len(e_dino), 1, 1)
        z = self.linear(e_dino)
        if self.kind == "scalar-gate":
            z = self.gate * z
        return z[:, None]  # (B, 1, context_dim)
