"""Identity: the angle between the features that a face recognition network finds in two faces (Tab. 1, "IDS"; Tab. 2, "Deg").

    IDS = cos(f(x_hat), f(x))        Deg = arccos(IDS) in degrees

The network is a file that the user gives, ONNX, run by the optional package onnxruntime; its input says how it sees a face:

    (N, 1, S, S)   gray, the whole aligned face resampled to S px, as in VQFR's script, which PMRF's took over (S = 128,
                   ronghuaiyang/arcface-pytorch's resnet18_110): Tab. 2's Deg
    (N, 3, S, S)   RGB, ArcFace's crop (S = 112, insightface): where its five points lie in a face that is aligned like FFHQ

Both resample without antialiasing, as those do, and take values in [-1, 1]. Identical pictures count, with 0 degrees; VQFR's
script leaves them out.

Usage: Identity("arcface.onnx")(x_hat, x)  ->  {"ids": 0.86, "deg": 30.7}
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from degrade import to_gray
from plumbing.commands import optional

# Eyes, nose and corners of the mouth as fractions of the side: in a face aligned like FFHQ (facexlib's template, 512 px), and
# in ArcFace's crop (insightface's template, 112 px); both count pixels from the middle of the first
FFHQ = [192.98138, 239.94708, 318.90277, 240.1936, 256.63416, 314.01935, 201.26117, 371.41043, 313.08905, 371.15118]
FFHQ = (np.reshape(FFHQ, (5, 2)) + 0.5) / 512
ARCFACE = [38.2946, 51.6963, 73.5318, 51.5014, 56.0252, 71.7366, 41.5493, 92.3655, 70.7299, 92.2041]
ARCFACE = (np.reshape(ARCFACE, (5, 2)) + 0.5) / 112


class Identity:
    """The network in a file: call with x_hat and x (1, 3, H, W) in [0, 1] -> {"ids": cosine, "deg": degrees}.

    ValueError if the file is no such network, or onnxruntime is missing.
    """

    def __init__(self, path):
        runtime = optional("onnxruntime", "--identity")
        try:
            self.network = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime has errors of its own for each kind of damage
            raise ValueError(f"expected a network in ONNX format in {path}, which cannot be read: name another") from e
        (self.input, shape), *others = [(i.name, i.shape) for i in self.network.get_inputs()]
        if others or len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3] or not isinstance(shape[2], int):
            raise ValueError(f"expected a network of one input (N, 1 or 3, S, S), got {shape} in {path}: name another")
        self.channels, self.size = shape[1], shape[2]

    def features(self, x):
        """f(x): (1, 3, H, W) -> (D,)."""
        if self.channels == 1:
            x = F.interpolate(to_gray(x)[:, :1], self.size, mode="bilinear")
        else:
            x = arcface_crop(x, self.size)
        return self.network.run(None, {self.input: (2 * x - 1).cpu().numpy()})[0].ravel().astype(np.float64)

    def __call__(self, x_hat, x):
        a, b = self.features(x_hat), self.features(x)
        ids = float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))
        return {"ids": ids, "deg": math.degrees(math.acos(ids))}


def arcface_crop(x, size):
    """(1, 3, H, W) -> (1, 3, size, size): the face moved, turned and scaled so that the points of FFHQ fall on ARCFACE."""
    to = 2 * FFHQ - 1, 2 * ARCFACE - 1  # as grid_sample counts: -1 ... 1 from edge to edge
    theta = torch.from_numpy(similarity(to[1], to[0])).to(x)  # from the crop's points to the picture's
    grid = F.affine_grid(theta[None], (1, 3, size, size), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", align_corners=False)


def similarity(p, q):
    """The (2, 3) matrix of scale, rotation and shift that takes the points p (n, 2) closest to q (n, 2), least squares."""
    x, y = (p - p.mean(0)).T
    u, v = (q - q.mean(0)).T
    a, b = (x @ u + y @ v) / (x @ x + y @ y), (x @ v - y @ u) / (x @ x + y @ y)  # scale times cosine and sine
    turn = np.array([[a, -b], [b, a]])
    return np.column_stack([turn, q.mean(0) - turn @ p.mean(0)])
