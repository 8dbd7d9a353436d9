"""The one policy of all pools: what only a machine can fail by is no candidate's, suspects run alone, and a
process that computes does not hang.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from evomerge.errors import MachineFault, SetupError
from evomerge.workers import Limits
from evomerge.workers.process_activity import ProcessActivity
from evomerge.workers.worker_table import WorkerSlot
from tests.support.night import CUDA, Night, bad, good, job

FULL = "OSError: [Errno 28] No space left on device"
MEMORY = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


class Seen:
    """What processes are seen to do. Satisfies `tries.Look`."""

    def __init__(self) -> None:
        self.stopped, self.used = False, 0.0

    def at(self, workers: Sequence[WorkerSlot]) -> Mapping[int, ProcessActivity]:
        return {worker.number: ProcessActivity(self.stopped, self.used) for worker in workers}

    def is_stopped(self, worker: WorkerSlot) -> bool:
        return self.stopped


def test_a_full_disk_is_never_the_candidates_while_others_are_done_in_between() -> None:
    night = Night("a")
    night.scheduler.submit([job(slot) for slot in range(9)])
    for _ in range(8):
        tried = night.assign()["w0"]
        night.finish(tried, bad(tried, FULL) if tried.job.slot == 0 else None)
        night.now += 100
    assert 0 not in night.results()
    while night.scheduler.out:
        tried = night.assign()["w0"]
        night.finish(tried)
        night.now += 100
        if night.scheduler.results and night.scheduler.results[-1][0].slot == 0:
            break
    assert night.results()[0] is None


def test_a_machine_that_fails_at_everything_pauses_the_search_and_blames_nobody() -> None:
    night = Night("ab")
    night.scheduler.submit([job(slot) for slot in range(40)])
    while len(night.scheduler.attempts) < 10:
        night.scheduler.raise_if_hopeless()
        for tried in night.assign().values():
            night.finish(tried, bad(tried, FULL if tried.job.slot % 2 == 0 else MEMORY))
        night.now += 100
    with pytest.raises(MachineFault, match=r"10 errors of the machine in a row .* No space left"):
        night.scheduler.raise_if_hopeless()
    assert night.results() == {}
    assert night.scheduler.out == 40
    assert {attempt.cause for attempt in night.attempts()} == {"failed"}


def test_want_of_memory_is_the_candidates_once_the_machine_did_another() -> None:
    night = Night("a")
    night.scheduler.submit([job(slot) for slot in range(3)])
    order = []
    for _ in range(4):
        tried = night.assign()["w0"]
        order.append(tried.job.slot)
        night.finish(tried, bad(tried, MEMORY) if tried.job.slot == 0 else None)
        night.now += 100
    assert order == [0, 1, 0, 2], "another goes first, and shows that the machine is well"
    assert night.results() == {1: None, 0: MEMORY, 2: None}


def test_a_worker_rests_after_an_error_of_its_machine_longer_each_time() -> None:
    night = Night("a", Limits(backoff=1.0))
    night.scheduler.submit([job(slot) for slot in range(5)])
    for pause in (1.0, 2.0, 4.0):
        tried = night.assign()["w0"]
        night.finish(tried, bad(tried, FULL))
        assert night.assign() == {}
        assert night.scheduler.next_idle(night.now) == pause
        night.now += pause
    assert list(night.assign()) == ["w0"]


def test_workers_that_cannot_be_opened_for_want_of_room_pause_the_search() -> None:
    for error, kind in ((FULL, MachineFault), ("ValueError: no", SetupError)):
        scheduler = Night("").scheduler
        for _ in range(3):
            scheduler.start_failed("w0", "", error)
        with pytest.raises(kind, match="no worker could be started, 3 tries"):
            scheduler.raise_if_hopeless()


def test_a_suspect_runs_with_nothing_beside_it_on_its_machine() -> None:
    night = Night("aab", Limits(first=100.0))
    begun = night.give(*(job(slot) for slot in range(6)))
    night.now += 50
    night.finish(begun["w1"])
    night.finish(begun["w2"])
    beside = night.assign()
    night.now += 51
    assert night.scheduler.overdue(night.now) == [begun["w0"].worker]
    assert night.assign() == {}, "w1 and w2 are busy; nothing new begins where the suspect goes"
    night.finish(beside["w2"])
    alone = night.assign()
    assert alone["w2"].job == begun["w0"].job
    assert alone["w2"].is_alone
    night.finish(beside["w1"])
    assert {t.worker.failure_domain for t in night.assign().values()} <= {"a"}


def test_the_clock_begins_at_scoring() -> None:
    night = Night("a", Limits(first=100.0, opening=5000.0))
    night.scheduler.submit([job(0)])
    (tried,) = night.scheduler.assign(night.now, prepares=True)
    night.now += 4999
    assert night.scheduler.overdue(night.now) == []
    night.scheduler.scoring_began(tried.number, night.now)
    night.now += 99
    assert night.scheduler.overdue(night.now) == []
    night.now += 2
    assert night.scheduler.overdue(night.now) == [tried.worker]
    assert [a.error for a in night.attempts()] == ["gave no result after 101 s, the limit is 100 s"]


def test_a_preparation_without_end_is_given_up() -> None:
    night = Night("a", Limits(first=100.0, opening=5000.0))
    night.scheduler.submit([job(0)])
    (tried,) = night.scheduler.assign(night.now, prepares=True)
    night.now += 5001
    assert night.scheduler.overdue(night.now) == [tried.worker]
    assert [a.error for a in night.attempts()] == ["was not ready to score after 5001 s, the limit is 5000 s"]


def test_the_time_limit_is_learnt_from_scoring_alone() -> None:
    night = Night("a")
    tried = night.give(job(0))["w0"]
    night.scheduler.finished(tried.number, bad(tried, "x"), night.now, 500.0)
    tried = night.give(job(1))["w0"]
    night.scheduler.finished(tried.number, good(tried), night.now, 500.0, scoring=20.0)
    assert night.scheduler.time_limit(1.0) == 4 * 20.0


def test_a_process_that_computes_does_not_hang_until_ten_times_its_limit() -> None:
    night, seen = Night("a", Limits(first=100.0)), Seen()
    tried = night.give(job(0))["w0"]
    begun = night.now
    while night.now - begun < 999:
        night.now += 9
        seen.used += 3.0
        assert night.scheduler.overdue(night.now, seen) == []
    night.now += 9
    assert night.scheduler.overdue(night.now, seen) == [tried.worker]


def test_a_process_that_stops_computing_at_its_limit_hangs() -> None:
    night, seen = Night("a", Limits(first=100.0)), Seen()
    tried = night.give(job(0))["w0"]
    night.now += 101
    assert night.scheduler.overdue(night.now, seen) == [], "the next look will tell"
    night.now += 11
    assert night.scheduler.overdue(night.now, seen) == [tried.worker]
    assert [a.cause for a in night.attempts()] == ["hung"]


def test_a_process_that_somebody_stopped_is_no_time_out_however_often() -> None:
    night, seen = Night("ab", Limits(first=100.0, floor=10.0)), Seen()
    seen.stopped = True
    night.scheduler.submit([job(0)])
    for number in range(4):
        (tried,) = night.assign().values()
        night.now += 11
        assert night.scheduler.overdue(night.now, seen) == [tried.worker]
        night.add_worker(number, tried.worker.failure_domain)
    assert night.results() == {}
    assert [a.cause for a in night.attempts()] == ["frozen"] * 4


def test_a_lost_device_retires_its_process_and_blames_nobody() -> None:
    night = Night("a")
    tried = night.give(job(0))["w0"]
    night.finish(tried, bad(tried, "RuntimeError: CUDA error: no CUDA-capable device is detected"))
    assert [worker.name for worker, _ in night.scheduler.retired] == ["w0"]
    assert night.results() == {}


def test_an_illegal_access_alone_on_one_device_is_blamed_after_five() -> None:
    night = Night("a")
    night.scheduler.submit([job(0)])
    for _ in range(5):
        assert night.results() == {}
        tried = night.assign()["w0"]
        night.finish(tried, bad(tried, CUDA))
        night.add_worker(0, "a")
        night.now += 100
    assert night.results() == {0: CUDA}
