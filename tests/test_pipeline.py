"""Reading and writing beside the network: order, concurrency, memory, faults."""

import io
import threading
import weakref
from pathlib import Path

import pytest
import torch

from plumbing import devices
from plumbing.pipeline import Job, overlapped, progress, trying


def nothing(jobs):
    pass


def test_the_next_is_read_and_the_last_is_written_while_one_is_worked_on():
    read, written = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def work(jobs):
        k = jobs[0]
        assert k == 2 or read[k + 1].wait(20)  # one step after the other would wait in vain
        assert k == 0 or written[k - 1].wait(20)

    done = overlapped([[0], [1], [2]], lambda jobs: read[jobs[0]].set(), work, lambda jobs: written[jobs[0]].set())
    assert list(done) == [[0], [1], [2]]


def test_steps_come_in_order_and_each_once():
    steps = [[] for _ in range(3)]
    for jobs in overlapped(([k, -k] for k in range(9)), *(seen.append for seen in steps)):
        assert all(jobs in seen for seen in steps)
    assert steps == [[[k, -k] for k in range(9)]] * 3
    assert list(overlapped([], nothing, nothing, nothing)) == []


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_memory_does_not_grow_with_the_number_of_pictures(workers):
    alive, most = weakref.WeakSet(), 0

    class Batch(list):
        __hash__ = object.__hash__

    def batches():
        for k in range(50):
            batch = Batch([torch.zeros(k)])
            alive.add(batch)
            yield batch

    for _ in overlapped(batches(), nothing, nothing, nothing, workers):
        most = max(most, len(alive))
    assert most <= 4 + (workers or 0)


@pytest.mark.parametrize("step", range(3))
def test_a_fault_of_the_code_comes_through(step):
    steps = [nothing] * 3
    steps[step] = lambda jobs: 1 / jobs[0]
    with pytest.raises(ZeroDivisionError):
        list(overlapped([[1], [0], [2]], *steps))


def test_what_a_user_can_cause_stays_with_the_jobs():
    jobs = [Job(Path("a.png"), Path("b.png")), Job(Path("c.png"), Path("d.png"))]
    with trying(jobs[:1]):
        raise OSError("expected a disk with room")
    assert "room" in str(jobs[0].error) and jobs[1].error is None
    with trying(jobs, "use a smaller batch"):
        raise MemoryError
    assert all(str(job.error).endswith("for a.png, c.png, got too little: use a smaller batch") for job in jobs)
    with pytest.raises(RuntimeError), trying(jobs):
        raise RuntimeError("a fault of the code")


def test_several_workers_work_at_the_same_time_on_one_core_each_and_keep_the_order():
    begun, threads = threading.Barrier(3), []

    def work(jobs):
        threads.append(torch.get_num_threads())
        begun.wait(20)  # until three work at the same time

    assert list(overlapped([[k] for k in range(9)], nothing, work, nothing, workers=3)) == [[k] for k in range(9)]
    assert threads == [1] * 9


def test_a_small_network_takes_one_core_a_picture_and_others_all_cores(monkeypatch):
    monkeypatch.setattr(devices, "cores_a_process", lambda: 16)
    network = torch.nn.Linear(2, 2)  # six parameters
    assert devices.workers_for(network, "cpu") == 4
    assert devices.workers_for(network, "cuda") is devices.workers_for(lambda y: y, "cpu") is None
    monkeypatch.setattr(devices, "LARGE", 6)
    assert devices.workers_for(network, "cpu") is None


@pytest.mark.parametrize("pictures, terminal", [(3, True), (1, True), (3, False)])
def test_a_bar_shows_the_rate_of_several_pictures_on_a_terminal(monkeypatch, pictures, terminal):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stderr)
    assert list(progress([[k] for k in range(pictures)], pictures)) == [[k] for k in range(pictures)]
    shown = stderr.getvalue()
    assert ("3/3" in shown and "pictures/s" in shown) if pictures > 1 and terminal else not shown
