"""The scheduler: each job answered once whatever happens to workers, and nobody blamed without evidence.

No Ray, no clock.
"""

from __future__ import annotations

import gc
import logging
import math
import random
from collections import Counter
from collections.abc import Sized

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.workers import Limits
from evomerge.workers.machine_errors import is_machine_error
from evomerge.workers.scheduler import Scheduler, Try
from tests.support.night import CUDA, Night, bad, good, job

# ---- the law: each job is answered once --------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.sampled_from([0.0, 0.1, 0.5]), st.booleans())
def test_each_job_is_answered_once_whatever_happens(
    seed: int, workers: int, rate: float, drain: bool
) -> None:
    rng = random.Random(seed)
    night = Night("abcde"[:workers], Limits(breaker=10**6, alone=1.0, tries=rng.choice((3, 20))))
    scheduler, asked, answers = night.scheduler, 0, Counter[int]()
    flying: dict[int, Try] = {}
    given_up: list[Try] = []
    taken: set[int] = set()
    for _ in range(400):
        night.now += rng.random() * 5
        if asked < 60 and rng.random() < 0.2:
            scheduler.submit([job(asked + i, rng.choice((1.0, 2.0, 5.0))) for i in range(7)])
            asked += 7
        for t in scheduler.assign(night.now):
            assert t.worker.number not in flying, "one job at a time"
            flying[t.worker.number] = t
        for late in scheduler.overdue(night.now):
            given_up.append(flying.pop(late.number))
            night.add_worker(int(late.name[1:]), late.failure_domain)
        if flying:
            t = flying[rng.choice(list(flying))]
            event = rng.random()
            if event < rate:
                del flying[t.worker.number]
                night.die(t, rng.choice(("died", "memory", "lost")))
            elif event < 0.8:
                del flying[t.worker.number]
                error = rng.choice((CUDA, "ValueError: no", None, None, None, None))
                night.finish(
                    t, bad(t, error) if error else None, rng.random() * 20, rng.choice((0, 1 << 20, 1 << 40))
                )
        for worker, _ in scheduler.retired:
            night.add_worker(int(worker.name[1:]), worker.failure_domain)
        scheduler.retired.clear()
        if given_up and rng.random() < 0.3:  # a worker that was killed answers after all, or never
            t = given_up.pop(rng.randrange(len(given_up)))
            night.finish(t) if rng.random() < 0.5 else scheduler.forget(t.number)
        while scheduler.results and rng.random() < 0.7:
            answers[scheduler.results.popleft()[0].slot] += 1
    if drain:
        scheduler.drain()
        taken = {t.job.slot for t in flying.values()}
        assert scheduler.out <= len(flying) + len(scheduler.results) + len(given_up)
    for _ in range(2000):
        night.now += 1
        for t in [*flying.values(), *scheduler.assign(night.now)]:
            flying.pop(t.worker.number, None)
            night.finish(t)
        scheduler.overdue(night.now)
        for worker, _ in scheduler.retired:
            night.add_worker(int(worker.name[1:]), worker.failure_domain)
        scheduler.retired.clear()
        while scheduler.results:
            answers[scheduler.results.popleft()[0].slot] += 1
        if not scheduler.out:
            break
    assert scheduler.out == 0
    assert max(answers.values(), default=1) == 1
    assert (taken if drain else set(range(asked))) <= set(answers)


def test_the_longest_begin_first_and_a_job_that_failed_before_them() -> None:
    night = Night("a")
    first = night.give(job(0, 1.0), job(1, 3.0), job(2, 2.0), job(3, 3.0))["w0"]
    order = [first.job.slot]
    night.die(first)
    for _ in range(4):
        done = night.assign()["w0"]
        order.append(done.job.slot)
        night.finish(done)
    assert order == [1, 1, 3, 2, 0]


def test_jobs_of_several_searches_are_in_one_queue() -> None:
    night = Night("ab")
    begun = night.give(job(0), job(1), job(2))
    night.scheduler.submit([job(10, 5.0), job(11)])
    night.finish(begun["w0"])
    assert night.assign()["w0"].job.slot == 10
    with pytest.raises(ValueError, match="slot 11 is out already"):
        night.scheduler.submit([job(11)])


# ---- the fault table ---------------------------------------------------------------------------------------


def test_a_job_whose_worker_died_is_done_on_another_device() -> None:
    night = Night("aab")
    begun = night.give(job(0))
    night.die(begun["w0"])
    again = night.assign()
    assert list(again) == ["w2"], "w0 and w1 share the device that is suspected"
    night.finish(again["w2"])
    assert night.results() == {0: None}
    assert [(a.cause, a.number, a.worker) for a in night.attempts()] == [("died", 1, "w0"), ("done", 2, "w2")]


def test_a_job_waits_for_another_device_while_that_is_busy() -> None:
    night = Night("ab")
    begun = night.give(job(0), job(1))
    night.die(begun["w0"])
    assert night.assign() == {}
    night.finish(begun["w1"])
    assert night.assign()["w1"].job.slot == 0


@pytest.mark.parametrize("places", ["a", "ab", "abcd"])
def test_three_dead_workers_are_the_candidates_doing(places: str) -> None:
    night = Night(places)
    again = night.give(job(0))
    for _ in range(3):
        assert night.results() == {}
        night.die(next(iter(again.values())), "memory" if places == "ab" else "died")
        again = night.assign()
    assert night.results() == {0: "poison: 3 worker processes died while it was evaluated"}
    assert again == {}
    assert night.scheduler.quarantined == set(), "a poisonous candidate quarantines no device"


def test_a_lost_node_is_nobodys_fault_but_not_for_ever() -> None:
    night = Night("ab", Limits(tries=6))
    again = night.give(job(0))
    for _ in range(6):
        assert night.results() == {}
        night.die(next(iter(again.values())), "lost")
        again = night.assign()
    assert night.results() == {0: "no result after 6 attempts: 6 lost"}


def test_a_second_time_out_is_a_result() -> None:
    night = Night("ab", Limits(first=100.0))
    first = night.give(job(0))["w0"]
    night.now += 99
    assert night.scheduler.overdue(night.now) == []
    night.now += 2
    assert night.scheduler.overdue(night.now) == [first.worker]
    second = night.assign()["w1"]
    night.now += 101
    assert night.scheduler.overdue(night.now) == [second.worker]
    assert night.results() == {0: "timed out twice; the limit is 4 times the median, and at least 60 s"}


def test_the_time_limit_follows_the_median_of_time_per_cost() -> None:
    night = Night("a")
    assert night.scheduler.time_limit(1.0) == Limits().first
    times = [30.0 + i for i in range(101)]
    random.Random(3).shuffle(times)
    for i, seconds in enumerate(times):
        night.finish(night.give(job(i, 2.0))["w0"], seconds=seconds)
    assert night.scheduler.time_limit(2.0) == 4 * 80.0
    assert night.scheduler.time_limit(20.0) == 4 * 800.0
    assert night.scheduler.time_limit(0.1) == 60.0, "the floor"
    for i in range(300):
        night.finish(night.give(job(i, 2.0))["w0"], seconds=200.0)
    assert night.scheduler.time_limit(2.0) == 800.0, "what is long ago is forgotten"


def test_a_failed_evaluation_is_a_result_at_once() -> None:
    night = Night("ab")
    begun = night.give(job(0), job(1))
    night.finish(begun["w0"], bad(begun["w0"], "the model's logits are NaN"))
    night.finish(begun["w1"], bad(begun["w1"], "ValueError: 3 is no answer"))
    assert night.results() == {0: "the model's logits are NaN", 1: "ValueError: 3 is no answer"}
    assert [a.cause for a in night.attempts()] == ["failed", "failed"]


def test_the_same_error_of_two_devices_is_the_candidates() -> None:
    night = Night("ab")
    first = night.give(job(0))["w0"]
    night.finish(first, bad(first, CUDA))
    assert night.results() == {}
    second = night.assign()["w1"]
    night.finish(second, bad(second, CUDA.replace("0x7f001", "0x7fe02")))
    assert night.results() == {0: CUDA.replace("0x7f001", "0x7fe02")}
    assert [worker.name for worker, _ in night.scheduler.retired] == ["w0", "w1"], (
        "what had a CUDA error is replaced"
    )


def test_an_error_of_one_device_is_not_the_candidates() -> None:
    night = Night("ab")
    first = night.give(job(0))["w0"]
    night.finish(first, bad(first, "OSError: [Errno 5] Input/output error: 'model.safetensors'"))
    night.finish(night.assign()["w1"])
    assert night.results() == {0: None}
    assert night.scheduler.retired == [], "a disk's error leaves the process whole"


@pytest.mark.parametrize(
    ("error", "machine"),
    [
        (CUDA, True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("RuntimeError: cuDNN error: X", True),
        ("the model's logits are NaN", False),
        ("task 'x' gave the metric nan", False),
        ("RuntimeError: shapes differ", False),
        ("KeyError: 'answer'", False),
        ("MemoryError: ", True),
    ],
)
def test_which_errors_are_tried_elsewhere(error: str, machine: bool) -> None:
    assert is_machine_error(error) == machine


def test_a_late_result_wins_where_it_is_the_first() -> None:
    night = Night("ab", Limits(first=10.0))
    first = night.give(job(0))["w0"]
    night.now += 11
    night.scheduler.overdue(night.now)
    second = night.assign()["w1"]
    night.finish(first, good(first, 0.25))
    assert night.results() == {0: None}
    night.finish(second, good(second, 0.25))
    assert night.results() == {}
    assert [a.cause for a in night.attempts()] == ["hung", "done", "late"]


@pytest.mark.parametrize("same", [True, False])
def test_a_second_result_that_differs_raises_an_alarm(same: bool, caplog: pytest.LogCaptureFixture) -> None:
    night = Night("ab", Limits(first=10.0))
    first = night.give(job(0))["w0"]
    night.now += 11
    night.scheduler.overdue(night.now)
    second = night.assign()["w1"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        night.finish(second, good(second, 1.0))
        night.finish(first, good(first, 1.0 if same else math.nextafter(1.0, 0)))
        night.finish(first, good(first, 0.0))
    assert [e.metrics for _, e in night.scheduler.results] == [{"first": 1.0}]
    assert ("not deterministic" in caplog.text) is not same


def test_what_can_still_come_late_is_forgotten_when_it_cannot() -> None:
    night = Night("ab", Limits(first=10.0))
    first = night.give(job(0))["w0"]
    night.now += 11
    night.scheduler.overdue(night.now)
    night.scheduler.forget(first.number)
    night.finish(first)
    assert night.results() == {}
    assert [a.cause for a in night.attempts()] == ["hung"]


# ---- workers and devices -----------------------------------------------------------------------------------


def test_a_worker_whose_memory_grew_is_replaced() -> None:
    night = Night("a")
    for i, gib in enumerate((3, 6, 6.9, 7.1)):
        assert night.scheduler.retired == []
        night.finish(night.give(job(i))["w0"], memory=int(gib * 2**30))
    assert "memory grew from 3072 to 7270 MiB" in night.scheduler.retired[0][1]
    assert night.give(job(9)) == {}, "it gets no more jobs"
    night.add_worker(0, "a")
    assert list(night.assign()) == ["w0"]


def test_workers_that_never_start_end_the_search_with_the_first_cause() -> None:
    scheduler = Scheduler()
    scheduler.expected_workers = 4
    for i in range(3):
        scheduler.start_failed(f"w{i}", "a", "the disk is gone" if i == 0 else "other")
        assert scheduler.broken is None
    scheduler.start_failed("w3", "a", "other")
    assert (
        scheduler.broken == "no worker could be started, 4 tries; the first failed because: the disk is gone"
    )


def test_failures_without_any_success_end_the_search() -> None:
    night = Night("ab", Limits(breaker=7))
    for i in range(7):
        assert night.scheduler.broken is None
        night.die(next(iter(night.give(job(i)).values())))
    assert "7 failures of workers in a row" in str(night.scheduler.broken)
    assert "died on purpose" in str(night.scheduler.broken)


def test_a_success_or_a_lost_node_in_between_does_not_end_it() -> None:
    night = Night("ab", Limits(breaker=5))
    for i in range(0, 60, 2):
        begun = night.give(job(i), job(i + 1))
        night.die(begun.get("w0") or begun["w1"], "lost" if i % 4 else "died")
        for _ in range(2):
            for t in [*night.assign().values(), *([begun["w1"]] if "w0" in begun else [])]:
                night.finish(t)
    assert night.scheduler.broken is None


def test_a_device_that_fails_what_others_can_do_is_quarantined() -> None:
    night = Night("ab")
    for i in range(12):
        for t in night.give(job(2 * i), job(2 * i + 1)).values():
            night.die(t) if t.worker.failure_domain == "a" else night.finish(t)
        while night.scheduler.out > len(night.scheduler.results):
            for t in night.assign().values():
                night.die(t) if t.worker.failure_domain == "a" else night.finish(t)
    assert night.scheduler.quarantined == {"a"}
    assert sum(a.cause == "died" for a in night.attempts()) <= Limits().strikes + 1, (
        "no job goes there any more"
    )
    assert set(night.results().values()) == {None}


def test_the_last_device_is_never_quarantined_and_one_comes_back_when_it_is_alone() -> None:
    night = Night("ab")
    for _ in range(10):
        night.scheduler.start_failed("w9", "a", "no")
        night.scheduler.start_failed("w9", "b", "no")
    assert night.scheduler.quarantined == {"a"}
    night.scheduler.leave(night.workers[1].number, "lost", "gone", night.now)
    assert night.give(job(0)) == {}
    for _ in range(2):
        night.scheduler.overdue(night.now)
        night.now += Limits().alone + 1
    assert night.scheduler.quarantined == set()
    assert list(night.assign()) == ["w0"]


def test_pauses_grow_while_a_worker_fails_and_end_when_it_works() -> None:
    night = Night("a")
    found = []
    for i in range(9):
        found.append(night.scheduler.backoff("w0"))
        night.die(next(iter(night.give(job(i)).values())), "died")
        night.scheduler.drain()
    assert found == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    night.finish(night.give(job(99))["w0"])
    assert night.scheduler.backoff("w0") == 0


def test_draining_drops_what_nobody_began() -> None:
    night = Night("ab")
    begun = night.give(*(job(i) for i in range(9)))
    night.scheduler.drain()
    assert night.scheduler.out == 2
    night.die(begun["w0"])
    night.finish(begun["w1"])
    assert (night.results(), night.scheduler.out, night.assign()) == ({1: None}, 0, {})
    assert [t.nth for t in night.give(job(0)).values()] == [1], "the pool goes on"


def test_what_workers_did_is_counted() -> None:
    night = Night("ab")
    begun = night.give(job(0), job(1))
    night.now += 10
    night.finish(begun["w0"], seconds=8.0)
    night.scheduler.leave(begun["w1"].worker.number, "died", "x", night.now)
    night.now += 10
    found = night.scheduler.usage(night.now)
    assert {n: (u.busy, u.alive, u.jobs) for n, u in found.items()} == {
        "w0": (8.0, 20.0, 1),
        "w1": (10.0, 10.0, 0),
    }


def held(part: object) -> int:
    """Entries of all containers of a part of the scheduler, and of the parts that it is made of."""
    count = 0
    for value in vars(part).values():
        if isinstance(value, Sized):
            count += len(value)
        elif type(value).__module__.startswith("evomerge.workers") and hasattr(value, "__dict__"):
            count += held(value)
    return count


def test_nothing_is_left_of_jobs_that_are_done() -> None:
    night = Night("abcd")

    def shift(first: int) -> int:
        for i in range(first, first + 2000):
            for t in night.give(job(i % 50)).values():
                night.die(t) if i % 7 == 0 else night.finish(t)
            while night.scheduler.out > len(night.scheduler.results):
                for t in night.assign().values():
                    night.finish(t)
            night.results(), night.attempts()
        gc.collect()
        return held(night.scheduler)

    shift(0)
    before, objects = shift(2000), len(gc.get_objects())
    assert shift(4000) == before
    assert len(gc.get_objects()) <= objects + 50
