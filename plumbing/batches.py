"""Which pictures a training step takes, and its random numbers: functions of seed and step alone, so that any run can go on."""

import hashlib
import signal

import torch


def generator(*key):
    """A CPU generator whose numbers follow from the key alone, of any size: generator("sgcl", seed, step, picture)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class Batches:
    """Step s takes places s B ... (s + 1) B - 1 of an endless row of shuffled epochs; a process takes its share of them.

    n: pictures; batch: B, over all processes; `steps`, a range, may be set later. Yields lists of indices, `accumulate` a step.
    ValueError if B cannot be shared evenly.
    """

    def __init__(self, n, batch, seed, rank=0, world=1, accumulate=1, steps=range(0)):
        self.n, self.batch, self.seed, self.steps = n, batch, seed, steps
        self.rank, self.accumulate, self.size = rank, accumulate, batch // (world * accumulate)
        if batch % (world * accumulate):
            got = f"{batch} and {world} x {accumulate}"
            raise ValueError(f"expected --batch to be a multiple of processes x --accumulate, got {got}: change it")

    def __iter__(self):
        for step in self.steps:
            for part in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
                first = step * self.batch + part * self.size
                yield [self.index(place) for place in range(first, first + self.size)]

    def index(self, place):
        epoch, i = divmod(place, self.n)
        if getattr(self, "epoch", None) != epoch:
            self.epoch = epoch
            self.order = torch.randperm(self.n, generator=generator("order", self.seed, epoch)).tolist()
        return self.order[i]


def loader(data, batches, device):
    """The batches of a cache, read ahead by four processes for a GPU; dicts of tensors."""
    ahead = dict(num_workers=4, pin_memory=True, worker_init_fn=deaf) if device.type == "cuda" else {}
    return torch.utils.data.DataLoader(data, batch_sampler=batches, **ahead)


def deaf(_):
    """A data worker leaves Ctrl-C to the process that it works for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
