"""The tiny preset's autoencoder: 3 x H x W -> C x H/8 x W/8, with the encode / decode interface of diffusers' VAE.

SD v1.5's VAE keeps 4 channels at a factor of 8, which in a small picture loses too much of a face. This one starts as a
linear projection of 8 x 8 patches on their principal components (a "learnt JPEG"), and convolutions whose last layers start
at zero learn what the projection misses. Images: (B, 3, H, W) in [-1, 1], H and W multiples of 8. Latents: (B, C, H/8, W/8).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.controlnets.controlnet import zero_module
from diffusers.models.modeling_outputs import AutoencoderKLOutput


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions with GroupNorm and SiLU, added to the input; the second starts at zero."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zero_module(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, h):
        return h + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(h))))))


class PCAAutoencoder(ModelMixin, ConfigMixin):
    """Principal components of 8 x 8 patches plus convolutional residuals, in both directions."""

    @register_to_config
    def __init__(self, latent_channels=24, widths=(96, 64, 32), depths=(2, 2, 2), scaling_factor=1.0):
        super().__init__()
        w16, w32, w64 = widths  # channels at 1/8, 1/4 and 1/2 of the resolution
        d16, d32, d64 = depths
        self.project = nn.Conv2d(192, latent_channels, 1)  # the principal components, see set_components
        self.unproject = nn.Conv2d(latent_channels, 192, 1)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, w32, 3, padding=1), *[ResBlock(w32) for _ in range(d32)],
            nn.Conv2d(w32, w16, 3, stride=2, padding=1), *[ResBlock(w16) for _ in range(d16)],
            nn.SiLU(), zero_module(nn.Conv2d(w16, latent_channels, 3, padding=1)),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, w16, 3, padding=1), *[ResBlock(w16) for _ in range(d16)],
            nn.Conv2d(w16, 4 * w32, 1), nn.PixelShuffle(2), *[ResBlock(w32) for _ in range(d32)],
            nn.Conv2d(w32, 4 * w64, 1), nn.PixelShuffle(2), *[ResBlock(w64) for _ in range(d64)],
            nn.SiLU(), nn.Conv2d(w64, 4 * 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
        # sees the linear picture too: it can smooth the seams of the 8 x 8 patches
        self.blend = nn.Conv2d(12 + 3, 16, 3, padding=1)
        self.to_rgb = zero_module(nn.Conv2d(16, 3, 3, padding=1))

    def encode(self, x):
        """(B, 3, H, W) in [-1, 1] -> an output whose latent_dist.mode() is (B, C, H/8, W/8); the variance is zero."""
        z = self.project(F.pixel_unshuffle(x, 8)) + self.encoder(x)
        moments = torch.cat([z, torch.zeros_like(z)], 1)
        return AutoencoderKLOutput(DiagonalGaussianDistribution(moments, deterministic=True))

    def decode(self, z):
        """(B, C, h, w) -> an output whose .sample is (B, 3, 8h, 8w) in about [-1, 1], unclipped."""
        linear = F.pixel_shuffle(self.unproject(z), 8)
        detail = self.blend(torch.cat([self.decoder(z), linear], 1))
        return DecoderOutput(sample=linear + self.to_rgb(F.silu(detail)))

    @torch.no_grad()
    def set_components(self, mean, down, up):
        """The linear pair from a mean (192,), rows into the latent coordinates (C, 192) and columns back (192, C)."""
        self.project.weight.copy_(down[:, :, None, None])
        self.project.bias.copy_(-down @ mean)
        self.unproject.weight.copy_(up[:, :, None, None])
        self.unproject.bias.copy_(mean)
