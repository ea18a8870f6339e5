"""Reading and writing beside the network: while one picture is restored, the next is read and the last one is written.

A Job goes through three steps, read(jobs), work(jobs) and write(jobs), and each fills in its fields. What fails in a step is
kept with the job, and the later steps pass it over. Jobs come in small lists, the batches of the network.

Usage: for jobs in progress(overlapped(batches, read, work, write), pictures): say(jobs[0].line)
"""

import contextlib
import dataclasses
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.commands import enough_memory
from plumbing.pictures import Picture


@dataclasses.dataclass
class Job:
    """A picture on its way from file to file."""

    path: Path
    target: Path
    picture: Picture | None = None
    x_hat: torch.Tensor | None = None  # (3, h, w) in [0, 1]
    line: str = ""  # what is said of it
    error: Exception | None = None


@contextlib.contextmanager
def trying(jobs, remedy="make it smaller"):
    """What a user can cause inside becomes the error of these jobs; remedy: what to do about too little memory."""
    try:
        with enough_memory(", ".join(str(job.path) for job in jobs), remedy):
            yield
    except (ValueError, OSError) as e:
        for job in jobs:
            job.error = e


def overlapped(batches, read, work, write, workers=None):
    """Yields each list of jobs after its three steps, in order. Reads one list ahead and writes one behind, in two threads.

    workers: threads for work, each of which computes on one core; None: the caller's own, on all cores. At most 4 + workers
    lists are in memory, however many come. When the caller is interrupted, what has begun is finished.
    """
    read, work, write = (partial(after, step) for step in (read, work, write))
    ready = beside(read, batches)
    return beside(write, beside(work, ready, workers) if workers else map(work, ready))


def after(step, jobs):
    """The jobs, once the step has been done with them."""
    step(jobs)
    return jobs


def beside(step, batches, threads=1):
    """Yields step(jobs) of each list of jobs, in order. It runs in threads, a core each, while the caller has those before."""
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        begun = deque()
        for jobs in batches:
            begun.append(pool.submit(step, jobs))
            if len(begun) > threads:
                yield begun.popleft().result()  # raises what a fault in the code raised
        while begun:
            yield begun.popleft().result()


def progress(batches, total):
    """The lists of jobs as they come; of several pictures a terminal shows how many a second, and the time left."""
    with tqdm(total=total, unit=" pictures", disable=None if total > 1 else True) as bar:
        for jobs in batches:
            with tqdm.external_write_mode():  # the caller's lines go above the bar
                yield jobs
            bar.update(len(jobs))
