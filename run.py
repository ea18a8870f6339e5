"""One training run on one process: its batches, its networks, its log and checkpoints (paper Sec. 4; train.py's ground).

The order of the pictures is a function of the seed alone, the sampler's position that of the step number: so a run goes on
where it was, and N processes share the steps of one.
"""

import hashlib
import json
import os
import signal

import torch
import torch.nn as nn

import losses
from cache import CacheDataset, weights_sha256
from plumbing import checkpoints, pictures
from student import Student, load_config, locate, newest_checkpoint
from teacher import PMRF

SAMPLES = 6  # pictures in grid.png


class Batches:
    """Step s takes places s B ... (s + 1) B - 1 of an endless row of shuffled epochs; a process takes its share of them.

    A function of (seed, step) alone: the sampler's position is the step number. Yields lists of indices, accumulate a step.
    """

    def __init__(self, n, batch, seed, first, last, rank=0, world=1, accumulate=1):
        self.n, self.batch, self.seed, self.steps = n, batch, seed, range(first, last)
        self.rank, self.parts = rank, (world, accumulate)

    def __len__(self):
        return len(self.steps) * self.parts[1]

    def __iter__(self):
        world, accumulate = self.parts
        for step in self.steps:
            places = range(step * self.batch, (step + 1) * self.batch)
            share = [self.index(p) for p in places][self.rank * self.batch // world :][: self.batch // world]
            size = len(share) // accumulate
            yield from (share[i * size : (i + 1) * size] for i in range(accumulate))

    def index(self, place):
        epoch, i = divmod(place, self.n)
        if getattr(self, "epoch", None) != epoch:
            self.epoch = epoch
            self.order = torch.randperm(self.n, generator=generator("order", self.seed, epoch)).tolist()
        return self.order[i]


def deaf(_):
    """A data worker leaves Ctrl-C to the process that it works for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class OneStep(nn.Module):
    """The student's Eq. 5 as the forward of a module, which is what DistributedDataParallel can wrap."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, z_y, y):
        return self.student.step(z_y, y)


def generator(*key):
    """A CPU generator whose numbers follow from the key alone, of any size: generator("sgcl", seed, step, picture)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def recompute(student):
    """Activations of the UNet, the spatial encoder and the VAE are made again in the backward pass, not kept."""
    for part in (student.unet, student.spatial_encoder, student.vae):
        if part._supports_gradient_checkpointing:  # all but the tiny preset's autoencoder
            part.enable_gradient_checkpointing()


class Run:
    """One training run on one process: its parts, its log, its checkpoints."""

    def __init__(self, args):
        self.args, self.rank, self.world = args, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
        if args.batch % (self.world * args.accumulate):
            raise ValueError(
                f"expected --batch to be a multiple of processes x --accumulate, got {args.batch} "
                f"and {self.world} x {args.accumulate}: change --batch"
            )
        self.data = CacheDataset(args.cache)
        self.student = self.build().to(self.device)
        self.teacher, self.lpips_fn = self.critics()
        self.check_networks()
        if args.precision == "auto":
            args.precision = "bf16" if gpu else "fp32"
        args.lr = self.student.config["lr"] if args.lr is None else args.lr
        self.trained = self.student.set_stage(args.stage)
        if args.checkpointing:
            recompute(self.student)
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=args.lr, weight_decay=5e-5)
        self.one_step = OneStep(self.student)

    def autocast(self):
        """Matrix products and convolutions in bf16 (Sec. 4), or nothing. Weights, latents, losses and EMA stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def build(self):
        """The student to train: published weights for Stage A, the Stage A checkpoint for Stage B; it must fit the cache."""
        args, meta = self.args, self.data.meta
        torch.manual_seed(args.seed)  # fresh layers: the same in every process
        if args.stage == "A":
            config = load_config(meta["preset"])
            config["adapter"] = args.adapter or config["adapter"]
            return Student.from_published(config)
        config = load_config(newest_checkpoint(args.init))
        if config["stage"] != "A":
            raise ValueError(f"expected a Stage A checkpoint in --init {args.init}, got one of Stage {config['stage']}")
        if config["preset"] != meta["preset"]:
            raise ValueError(
                f"expected a cache of preset {config['preset']!r}, that of {args.init}; got preset {meta['preset']!r} in "
                f"{args.cache}: make a cache with --preset {config['preset']}"
            )
        if args.adapter not in (None, config["adapter"]):
            raise ValueError(
                f"expected --adapter {config['adapter']}, that of {args.init}; got {args.adapter}: leave it out"
            )
        return Student.load(args.init)

    def critics(self):
        """The frozen networks behind the pixel terms of Eq. 6, each where it is needed: the teacher (SGCL) and LPIPS."""
        args, teacher, lpips_fn = self.args, None, None
        if args.lambda_sgcl:
            teacher = PMRF.from_pretrained(locate(self.student.config["teacher"])).to(self.device)
            teacher.requires_grad_(False)
        if args.lambda_lpips or args.lambda_l1 or args.lambda_sgcl:
            lpips_fn = losses.load_lpips().to(self.device)
        return teacher, lpips_fn

    def check_networks(self):
        """ValueError if the cache was made with another VAE (its latents are then of another space) or another teacher."""
        for name, network in (("vae", self.student.vae), ("teacher", self.teacher)):
            ours, theirs = network and weights_sha256(network), self.data.meta[f"{name}_sha256"]
            if network and ours != theirs:
                raise ValueError(
                    f"expected a cache made with the preset's {name} (sha256 {ours[:12]}), {self.args.cache} was made "
                    f"with another ({theirs[:12]}): make the cache again"
                )

    def loader(self, first):
        """The batches of steps first + 1 ... args.steps for this process."""
        args, n = self.args, len(self.data)
        batches = Batches(n, args.batch, args.seed, first, args.steps, self.rank, self.world, args.accumulate)
        workers = 4 if self.device.type == "cuda" else 0
        return torch.utils.data.DataLoader(
            self.data, batch_sampler=batches, num_workers=workers, pin_memory=workers > 0, worker_init_fn=deaf
        )

    def settings(self):
        """What must be equal for a run to go on; written into every checkpoint's config.json."""
        names = ["stage", "steps", "batch", "seed", "precision", "sgcl_every", "sgcl_source"]
        names += ["lambda_lat", "lambda_lpips", "lambda_l1", "lambda_sgcl"]
        chosen = {name: getattr(self.args, name) for name in names}
        chosen["peak_lr"] = self.args.lr  # "lr" is the preset's default, which Stage B reads from Stage A's config.json
        origin = {"init": self.args.init and str(self.args.init), "adapter": self.student.config["adapter"]}
        return {**chosen, **origin, **self.cache_identity()}

    def cache_identity(self):
        """What tells one cache from another: the settings that a reader knows, then the bytes of all its shards."""
        meta = self.data.meta
        shards = hashlib.sha256(" ".join(shard["sha256"] for shard in meta["shards"]).encode()).hexdigest()
        known = {name: meta[name] for name in ("seed", "steps", "repeats", "count", "teacher_sha256", "vae_sha256")}
        known |= {"ranges": [ranges["name"] for ranges in meta["ranges"]], "shards_sha256": shards}
        return {f"cache_{name}": value for name, value in known.items()}

    def save(self, step):
        """A checkpoint of this step and the sample grid, by rank 0."""
        if self.rank:
            return

        def fill(folder):
            checkpoints.save_training(folder / "training.safetensors", self.trained, self.optimizer)
            with checkpoints.averaged(self.trained, self.ema):
                self.grid(self.args.out / "grid.png")
                self.student.save(folder, **self.settings(), step=step, torch=torch.__version__)

        checkpoints.write(self.args.out, step, fill)

    def resume(self):
        """Goes on from the newest checkpoint of --out, if there is one. Returns its step, or 0."""
        found = checkpoints.steps_in(self.args.out)
        if not found:
            if self.args.resume:
                raise FileNotFoundError(
                    f"expected a checkpoint in {self.args.out}, found none: leave --resume out to begin"
                )
            return 0
        checkpoints.check_settings(found[-1], self.settings())
        self.student.load_trained(found[-1])
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}
        step = self.student.config["step"]
        checkpoints.load_training(found[-1] / "training.safetensors", self.trained, self.optimizer, step)
        return step

    @torch.no_grad()
    def grid(self, path):
        """LQ | student | X†, a row for each of the first pictures of the cache."""
        rows = [self.data[i] for i in range(min(SAMPLES, len(self.data)))]
        y, x_target = (torch.stack([r[k] for r in rows]) for k in ("y", "x_target"))
        with self.autocast():
            x_hat = self.student(y.to(self.device)).float().cpu()
        pictures.write_image(path, torch.cat([torch.cat(list(column), 1) for column in (y, x_hat, x_target)], 2))

    def log(self, step, lr, raw, lambdas):
        """One line of log.jsonl: the terms of Eq. 6, raw and weighted. Returns their sum."""
        weighted = {name: lambdas[name] * value for name, value in raw.items()}
        line = {"step": step, "lr": lr, "loss": sum(weighted.values()), "raw": raw, "weighted": weighted}
        path = self.args.out / "log.jsonl"
        try:
            if not self.rank:
                with open(path, "a") as f:
                    f.write(json.dumps(line) + "\n")
        except OSError as e:  # a full disk does not say where
            raise OSError(
                f"could not write {path}: {e.strerror}; the same command goes on from the last checkpoint"
            ) from e
        return line["loss"]
