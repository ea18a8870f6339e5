"""How numbers are written down: titles and digits of the measures, Markdown tables; nothing else."""

from evaluation.metrics import mean_interval
from plumbing.files import make_folder, write_bytes

TITLES = {  # which variant is measured stands beside the name
    "psnr": "PSNR (RGB) ↑",
    "ssim": "SSIM (RGB) ↑",
    "mse": "MSE (of 255²) ↓",
    "lpips": "LPIPS (Alex) ↓",
    "lpips-vgg": "LPIPS (VGG) ↓",
    "fid": "FID ↓",
    "kid": "KID ↓",
    "precision": "Precision ↑",
    "musiq": "MUSIQ (pyiqa) ↑",
    "niqe": "NIQE (pyiqa) ↓",
    "ids": "IDS (cosine) ↑",
    "deg": "Deg (°) ↓",
    "ms": "ms a face",
}
DIGITS = {"psnr": 2, "mse": 1, "musiq": 2, "niqe": 2, "deg": 2}  # the others have 4


def interval(values, metric, sign=""):
    """The mean over faces with its 95 % interval, as text; sign: "+" for differences."""
    mean, low, high = (f"{v:{sign}.{DIGITS.get(metric, 4)}f}" for v in mean_interval(values))
    return f"{mean} [{low}, {high}]"


def spread(values, metric):
    """The mean over training seeds with the lowest and the highest, as text."""
    d = DIGITS.get(metric, 4)
    return f"{sum(values) / len(values):.{d}f} ({min(values):.{d}f} to {max(values):.{d}f})"


def markdown(header, rows):
    """A Markdown table: the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(str(c) for c in line) + " |\n" for line in lines)


def write_text(path, text):
    """Writes text as UTF-8, whole or not at all; makes the folder. A file name in it need not be valid UTF-8."""
    make_folder(path.parent)
    write_bytes(path, text.encode(errors="backslashreplace"))
