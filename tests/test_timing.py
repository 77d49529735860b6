"""How far timings are trusted: intervals, a busy machine, and too many threads."""

import queue
import random
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from test_slimming import slimmed

from slimcli.measure import clock, timing
from slimcli.measure.streams import Streams, advice, streams
from slimcli.measure.timing import Load, Timing, allowed_cores, half_width, interval, narrow, speedup


def test_the_speedup_is_the_median_of_paired_rounds():
    assert speedup([2.0, 20.0, 4.0], [1.0, 10.0, 4.0]) == 2.0


def test_the_interval_holds_the_median_nineteen_times_in_twenty():
    draw = random.Random(0)
    held = 0
    for _ in range(400):
        low, high = interval([draw.gauss(1.4, 0.2) for _ in range(25)])
        held += low <= 1.4 <= high
    assert 0.92 <= held / 400 <= 0.99


def test_few_rounds_have_their_range_as_interval():
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_rounds_that_agree_are_enough():
    assert narrow([[1.0, 1.01] * 10, [0.7, 0.71] * 10])
    assert not narrow([[1.0, 1.5] * 10, [0.7, 0.5] * 10])
    assert half_width([0.0, 0.0]) == 0.0


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (Load(2, 2, got=0.99, others=0.02, stolen=0.0), None),
        (Load(2, 2, got=None), None),
        (Load(1, 2, got=0.5, others=2.0), "the work got 50 % of the time it needed"),
        (Load(2, 2, got=0.6, others=1.0), "OMP_NUM_THREADS=1"),
        (Load(8, 2, got=0.99), "8 threads share the 2 cores that this process may use: set OMP_NUM_THREADS=2"),
        (Load(1, 2, got=0.99, stolen=0.2), "the host gave 20 % of the time to other machines"),
    ],
)
def test_what_made_a_timing_doubtful_is_named_with_what_to_do(load, words):
    assert (load.problem is None) if words is None else words in load.problem
    figures = Timing([[1.0] * 9, [0.5] * 9], load).figures(1)
    assert figures["timing_reliable"] is (words is None)
    assert figures["speedup"] == 2.0 and figures["speedup_interval"] == (2.0, 2.0)


def test_rounds_that_differ_are_not_believed_on_a_quiet_machine_either():
    figures = Timing([[1.0, 2.0] * 6, [1.0] * 12], Load(1, 2, got=1.0)).figures(1)
    assert figures["timing_reliable"] is False and "the rounds differ too much" in figures["timing_note"]


@pytest.mark.skipif(not timing._Clocks.read().waits, reason="this kernel does not say how long threads waited")
def test_programs_that_take_the_cores_are_noticed():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * allowed_cores())]
    try:
        x = torch.randn(256, 256)
        found = clock.take_turns([lambda: x @ x] * 2, torch.device("cpu"), 3, 1.0, 1.0)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert found.load.got < timing.ENOUGH_CORES
    assert "other programs kept the cores busy" in found.figures(1)["timing_note"]


def test_a_container_that_allows_fewer_cores_is_heard(tmp_path, monkeypatch):
    assert allowed_cores() >= 1
    monkeypatch.setattr(timing, "_quota", lambda: 0.5)
    assert allowed_cores() == 1


class Threads:
    """Threads in the place of processes, which take long to start."""

    Barrier, SimpleQueue = staticmethod(threading.Barrier), staticmethod(queue.SimpleQueue)

    class Process(threading.Thread):
        exitcode = None


def test_streams_measure_one_process_and_one_a_core(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda kind: Threads)
    monkeypatch.setattr(Threads.Process, "terminate", lambda self: None, raising=False)
    found = streams(slimmed(), [0.5], seconds=0, cores=2)
    assert [(each.keep_rate, each.processes, each.threads) for each in found] == [
        *((None, 1, 2), (0.5, 1, 2)),
        *((None, 2, 1), (0.5, 2, 1)),
    ]
    assert all(each.images_per_second > 0 and each.latency_ms > 0 for each in found)
    assert streams(slimmed(), [0.5], cores=1) == []


def test_streams_say_which_is_better():
    one, many = Streams(0.5, 1, 2, 40.0, 25.0), Streams(0.5, 2, 1, 60.0, 33.0)
    assert advice([one, many]).endswith("one stream a core is better: 1.50 times the images")
    assert advice([Streams(0.5, 1, 2, 60.0, 17.0), replace(many, images_per_second=40.0)]).endswith(
        "one process of 2 threads is better: 1.50 times the images"
    )


def test_threads_are_those_of_the_command_alone(slim, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    assert slim("profile", "digits_vit", "--seconds", 0, "--threads", 2).exit_code == 0
    assert given == [2, torch.get_num_threads()]
