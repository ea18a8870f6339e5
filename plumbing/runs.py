"""The folder of a training run, safe against being killed: checkpoints, log, sample grid, and what must not change.

step-NNNNNN/, whole or absent, holds what Student.save writes (the EMA weights), and training.safetensors: the raw weights and
AdamW's two moments. All else that a run needs to go on (batches, learning rate, random numbers) follows from step and seed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from plumbing import files, pictures
from plumbing.presets import check_same, load_config, steps_in
from plumbing.shards import weights_sha256

MOMENTS = ("exp_avg", "exp_avg_sq")


# --- what must be equal -------------------------------------------------------------------------------------------------


def settings(args, config, meta):
    """What must be equal for a run to go on, as a dict; written into every checkpoint's config.json."""
    names = ["stage", "steps", "batch", "seed", "precision", "sgcl_every", "sgcl_source"]
    names += ["lambda_lat", "lambda_lpips", "lambda_l1", "lambda_sgcl"]
    chosen = {name: getattr(args, name) for name in names}
    chosen["peak_lr"] = args.lr  # "lr" is the preset's default, which Stage B reads from Stage A's config.json
    origin = {"init": args.init and str(args.init), "adapter": config["adapter"], "entry": config["entry"]}
    cache = {name: meta[name] for name in ("seed", "steps", "repeats", "count", "teacher_sha256", "vae_sha256")}
    cache["ranges"] = [ranges["name"] for ranges in meta["ranges"]]
    cache["shards_sha256"] = hashlib.sha256(" ".join(s["sha256"] for s in meta["shards"]).encode()).hexdigest()
    return {**chosen, **origin, **{f"cache_{name}": value for name, value in cache.items()}}


def check_settings(folder, now, otherwise="another --out"):
    """ValueError that names the settings of the checkpoint that differ from `now`."""
    before = load_config(folder)
    if now.get("init") and os.path.realpath(now["init"]) == os.path.realpath(before.get("init") or ""):
        now = now | {"init": before["init"]}  # a path may be relative in one run and absolute in the next
    check_same(before, now, folder, f"give the same, or {otherwise}")


def check_init(config, args, meta):
    """ValueError if config, that of --init, is no Stage A checkpoint of the cache's preset and of the options given."""
    if config["stage"] != "A":
        raise ValueError(f"expected a Stage A checkpoint in --init {args.init}, got one of Stage {config['stage']}")
    if config["preset"] != meta["preset"]:
        raise ValueError(f"expected a cache of preset {config['preset']!r}, --init's, got {meta['preset']!r}: make one")
    for name in ("adapter", "entry"):
        given, there = getattr(args, name), config[name]
        if given not in (None, there):
            raise ValueError(f"expected --{name} {there}, that of {args.init}; got {given}: leave it out")


def check_networks(cache, meta, **networks):
    """ValueError if the cache was made with another VAE (its latents are then of another space) or another teacher."""
    for name, network in networks.items():
        if network and weights_sha256(network) != meta[f"{name}_sha256"]:
            raise ValueError(f"expected a cache made with the preset's {name}, got {cache} of another: make it again")


# --- checkpoints, written by one process at a time -----------------------------------------------------------------------

LOCKED = set()  # open folders into which this process trains
if fcntl:  # a forked data worker outlives a killed training by seconds, in which the next one may begin
    os.register_at_fork(after_in_child=lambda: [os.close(LOCKED.pop()) for _ in tuple(LOCKED)])


@contextlib.contextmanager
def alone(out, rank):
    """Inside, no other training writes into the folder out; ValueError where one does. The lock ends with the process."""
    with contextlib.ExitStack() as stack:
        if fcntl and not rank:  # rank 0 locks it for all processes of a training
            folder = os.open(files.make_folder(out), os.O_RDONLY)
            LOCKED.add(folder)
            stack.callback(lambda: (LOCKED.remove(folder), os.close(folder)))
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is training into {out}: wait for it, or change --out") from None
            except OSError:  # as on some network disks
                pass
        yield


def write(out, step, fill, keep=2):
    """Makes out/step-NNNNNN by fill(folder), whole or not at all, and drops all but the last `keep`. OSError if that fails."""
    final, temporary = out / f"step-{step:06d}", out / f"step-{step:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            files.sync(path)
        if final not in steps_in(out):
            shutil.rmtree(final, ignore_errors=True)  # of that name, but no checkpoint
            os.replace(temporary, final)
        files.sync(out)
    except Exception as e:  # safetensors and diffusers have errors of their own for a full disk
        goes_on = f"goes on from {steps_in(out)[-1]}" if steps_in(out) else "begins anew"
        raise OSError(f"could not write {final} ({e}): make room, the same command {goes_on}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in {*out.glob("step-??????")} - {*steps_in(out)[-keep:]}:
        shutil.rmtree(old)  # what a killed process has half removed, too


def save_training(path, trained, optimizer):
    """Raw weights and AdamW's moments of the trained parameters {name: parameter}, by name, as safetensors."""
    tensors = {f"weight.{name}": p.detach() for name, p in trained.items()}
    for key in MOMENTS:
        tensors |= {f"{key}.{name}": optimizer.state[p][key] for name, p in trained.items() if p in optimizer.state}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def load_training(path, trained, optimizer, step):
    """Puts back what save_training wrote. ValueError if the file is cut or of another run."""
    try:
        tensors = load_file(path)
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(tensors[f"weight.{name}"])
                if f"exp_avg.{name}" in tensors:
                    moments = {key: tensors[f"{key}.{name}"].to(p.device) for key in MOMENTS}
                    on = p.device if optimizer.defaults["fused"] else "cpu"  # where AdamW keeps its count
                    optimizer.state[p] = {"step": torch.tensor(float(step), device=on), **moments}
    except Exception as e:  # safetensors has errors of its own
        raise ValueError(f"expected a run's state in {path}, got {e}: delete {path.parent} to go on") from None


@contextlib.contextmanager
def averaged(trained, ema):
    """Inside, the trained parameters have their EMA values."""
    raw = {name: p.detach().clone() for name, p in trained.items()}
    try:
        for name, p in trained.items():
            p.data.copy_(ema[name])
        yield
    finally:
        for name, p in trained.items():
            p.data.copy_(raw[name])


# --- log and grid -------------------------------------------------------------------------------------------------------


class Log:
    """log.jsonl of a run: the terms of Eq. 6, raw and weighted, means over the batch of all processes."""

    def __init__(self, out, rank, world, first):
        self.path, self.rank, self.world, self.since = out / "log.jsonl", rank, world, time.perf_counter()
        if not rank:
            out.mkdir(parents=True, exist_ok=True)
            trim(self.path, first)

    def mean(self, values):
        """{name: scalar tensor of this process} -> {name: float}, the mean over the processes: the same in each."""
        means = torch.stack([v.detach().float() for v in values.values()])
        if self.world > 1:
            dist.all_reduce(means)
            means /= self.world
        return dict(zip(values, means.tolist(), strict=True))

    def write(self, step, lr, raw, lambdas):
        """A line; `seconds` are those since the line before it. Returns the loss, the sum of the weighted terms."""
        raw = dict.fromkeys(lambdas, 0.0) | raw
        weighted = {name: lambdas[name] * value for name, value in raw.items()}
        now, loss = time.perf_counter(), sum(weighted.values())
        line = {"step": step, "seconds": round(now - self.since, 4), "processes": self.world, "lr": lr, "loss": loss}
        self.since = now
        try:
            if not self.rank:
                with open(self.path, "a") as f:
                    f.write(json.dumps(line | {"raw": raw, "weighted": weighted}) + "\n")
        except OSError as e:  # a full disk does not say where
            raise OSError(f"could not write {self.path}: {e.strerror}; make room, the same command goes on") from e
        return loss


def read_log(path, needed=("step",)):
    """The lines of a log.jsonl, dicts; the last one may be in the writing. ValueError if a line lacks one of `needed`."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a training's log in {path}, found none: name a folder of train.py")
    with contextlib.suppress(json.JSONDecodeError, AttributeError):
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if all(line.keys() >= set(needed) for line in lines):
            return lines
    raise ValueError(f"expected {', '.join(needed)} in each line of {path}, got others: train it again")


def trim(path, step):
    """Drops what a killed run logged after its last checkpoint: those steps are made again."""
    if path.is_file():
        kept = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step]
        files.write_bytes(path, "".join(kept).encode())  # whole or not at all: a run can be killed here, too


@torch.no_grad()
def grid(path, data, restore):
    """Writes LQ | student | X†, a row for each of the first pictures of the cache; restore: (B, 3, S, S) -> the same."""
    rows = [data[i] for i in range(min(6, len(data)))]
    y, x_target = (torch.stack([r[k] for r in rows]) for k in ("y", "x_target"))
    x_hat = restore(y).float().cpu()
    pictures.write_image(path, torch.cat([torch.cat(list(column), 1) for column in (y, x_hat, x_target)], 2))
