"""Colours of pictures in files: ICC profiles, converted to sRGB by Pillow's ImageCms (Little CMS)."""

import io

import numpy as np
from PIL import Image, ImageCms

from plumbing.commands import complain

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
SRGB = _SRGB.tobytes()[:24] + bytes(12) + _SRGB.tobytes()[36:]  # what results carry, without the time of its making
MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}  # ICC's colour spaces as Pillow's modes
RULE = {"renderingIntent": ImageCms.Intent.RELATIVE_COLORIMETRIC, "outputMode": "RGB"}


def to_srgb(image, profile, name):
    """A picture without alpha (mode L, RGB, CMYK or LAB) as RGB in sRGB.

    profile: the bytes of its ICC profile, or None for sRGB (CMYK: plain inks on white; LAB: CIE's under D50). The intent is
    relative colorimetric, with black point compensation. A gray picture (R = G = B) stays one. A profile that is broken, or
    meant for another kind of picture, is ignored with a line on stderr, where `name` stands for the file.
    """
    if not profile and image.mode != "LAB":
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        mode = MODES[source.profile.xcolor_space.strip()]
        if mode != image.mode and (image.mode, mode) != ("L", "RGB"):
            raise ValueError(f"a profile for {mode} in a picture of mode {image.mode}")
        if image.mode in ("L", "RGB") and len({band.tobytes() for band in image.split()}) == 1:  # gray
            return _gray_to_srgb(image.getchannel(0), source, mode)
        return ImageCms.profileToProfile(image, source, _SRGB, flags=ImageCms.Flags.BLACKPOINTCOMPENSATION, **RULE)
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        complain(f"{name}: its colour profile is broken or of another kind of picture, and is ignored")
        return image.convert("RGB")


def _gray_to_srgb(image, source, mode):
    # through the curve of its 256 values: the short cuts by which Little CMS converts a whole picture blur the dark ones
    exact = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOOPTIMIZE
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert(mode)
    curve = ImageCms.profileToProfile(ramp, source, _SRGB, flags=exact, **RULE).getchannel("G")
    return image.point(list(curve.tobytes())).convert("RGB")
