"""How busy workers are, how fast one driver hands out candidates, and what it keeps: writes
results/cluster.md.

Simulated with the scheduler that the Ray pool runs (evomerge/workers/scheduler.py), event by event, on a
clock of its own: candidates take 60 s with a log-normal spread of .1, two of a hundred five times as long,
wherever they run. Each island waits for all candidates of its generation before it asks for the next, a
pipelined one for those of the generation before; all share the workers. With --real also two Ray workers on
this machine that sleep by the same law, .2 s a candidate.

usage: python scripts/benchmarks/cluster.py [--real | --only-real] [--seeds 2] [--evaluations 1000000] [--out
    results/cluster.md]
"""

from __future__ import annotations

import argparse
import functools
import heapq
import logging
import math
import os
import random
import shlex
import sys
import time
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from evomerge.evaluation import Evaluation, Items
from evomerge.optimizers import Array
from evomerge.optimizers.cma_es import CmaEs
from evomerge.recipes import Mix, Recipe
from evomerge.workers import Job, Limits, Pool
from evomerge.workers.scheduler import Scheduler, Try
from evomerge.workers.worker_table import WorkerSlot
from scripts.benchmarks import machine

REPOSITORY = Path(__file__).resolve().parents[2]
PASS = Mix("passthrough", (("base", None),))
RECIPE = Recipe("base", (PASS,), PASS, PASS)
ITEMS: Items = {"task": ("1",)}
SECONDS, SPREAD, RARE, TIMES = 60.0, 0.1, 0.02, 5.0
OPENING = 30.0  # seconds until a worker that was killed is replaced
NEVER = Limits(factor=1e6)
GAIN, GENES, SEEDS = 1000.0, 40, 7
WORKERS, ISLANDS, EACH = (8, 64, 1024), (1, 2, 4, 8), (2, 4, 8)


@functools.cache
def evaluation() -> Evaluation:
    return Evaluation(RECIPE.id, (), {"task": 1.0}, {})


def law(seed: int, slot: int, seconds: float = SECONDS) -> float:
    """Seconds of a candidate, the same at every worker."""
    own = random.Random(seed * 1_000_003 + slot)
    return seconds * math.exp(own.gauss(0.0, SPREAD)) * (TIMES if own.random() < RARE else 1.0)


class Islands:
    """Searches that each wait for their generation, pipelined ones for that before their last.

    begin: jobs to hand over at the start; ended: jobs to hand over after a result. done: generations of each
    island that are over, and all before them.
    """

    def __init__(self, islands: int, population: int, generations: int, pipelined: bool = False) -> None:
        self.population, self.generations, self.ahead = population, generations, int(pipelined)
        self.done, self.slots = [0] * islands, count()
        self.left = [[population] * generations for _ in range(islands)]
        self.owner: dict[int, tuple[int, int]] = {}

    def begin(self) -> list[Job]:
        return [
            job
            for island in range(len(self.left))
            for g in range(min(1 + self.ahead, self.generations))
            for job in self.generation(island, g)
        ]

    def generation(self, island: int, number: int) -> list[Job]:
        jobs = [
            Job(next(self.slots), RECIPE, ITEMS, turn=number if self.ahead else 0)
            for _ in range(self.population)
        ]
        self.owner.update({job.slot: (island, number) for job in jobs})
        return jobs

    def ended(self, slot: int) -> list[Job]:
        island, number = self.owner.pop(slot)
        left = self.left[island]
        left[number] -= 1
        jobs = []
        while self.done[island] < self.generations and not left[self.done[island]]:
            self.done[island] += 1
            if self.done[island] + self.ahead < self.generations:
                jobs += self.generation(island, self.done[island] + self.ahead)
        return jobs


@dataclass(frozen=True, slots=True)
class Night:
    """What a simulated search came to.

    busy, useful: shares of the workers' time in the steady part; useful is what gave a score; failed: share
    of candidates that ended as timed out; seconds: that the scheduler took, of one core, of it and of the
    simulation.
    """

    busy: float
    useful: float
    failed: float
    evaluations: int
    cpu: float
    wall: float
    memory: tuple[float, ...]  # MiB, at each tenth


def _slot(number: int, place: int) -> WorkerSlot:
    """A worker at a place; eight share a host."""
    host = f"host{place // 8}"
    return WorkerSlot(number, f"w{place}", f"{host} cuda:{place % 8}", host)


def simulate(
    workers: int,
    islands: int,
    population: int,
    generations: int,
    limits: Limits,
    seed: int,
    shares: bool = True,
    pipelined: bool = False,
) -> Night:
    """A search from its first generation to its end; shares are of the time from when all islands are at
    their second generation until one is at its end. shares: keep what they are made of; without it the memory
    is the scheduler's and the simulation's alone.
    """
    scheduler, crowd, now = Scheduler(limits), Islands(islands, population, generations, pipelined), 1.0
    scheduler.expected_workers = workers
    numbers = count(1)
    for i in range(workers):
        scheduler.join(_slot(next(numbers), i), now)
    # what ends when: a try, or the opening of a worker
    events: list[tuple[float, int, Try | WorkerSlot]] = []
    order, next_look = count(), now
    total, results, failed = islands * population * generations, 0, 0
    spans: list[tuple[float, float, bool]] = []
    first = last = 0.0
    memory: list[float] = []
    cpu, wall = time.process_time(), time.perf_counter()
    scheduler.submit(crowd.begin())
    while results < total:
        for given in scheduler.assign(now):
            heapq.heappush(events, (now + law(seed, given.job.slot), next(order), given))
        if next_look <= events[0][0]:
            now = next_look
            next_look += 5.0
            for late in scheduler.overdue(now):
                heapq.heappush(events, (now + OPENING, next(order), replace(late, number=next(numbers))))
        else:
            now, _, what = heapq.heappop(events)
            if isinstance(what, WorkerSlot):
                scheduler.join(what, now)
            elif scheduler.is_running(what):
                scheduler.finished(what.number, evaluation(), now, now - what.started)
            else:
                scheduler.forget(what.number)
        for ended in scheduler.attempts:
            if shares:
                spans.append((ended.started, ended.started + ended.seconds, ended.cause == "done"))
        scheduler.attempts = []
        while scheduler.results:
            job, found = scheduler.results.popleft()
            results, failed = results + 1, failed + (found.error is not None)
            scheduler.submit(crowd.ended(job.slot))
            if results % max(1, total // 10) == 0:
                memory.append(resident())
        if not first and min(crowd.done) >= 1:
            first, spans = now, [s for s in spans if s[1] > now]
        if not last and max(crowd.done) >= generations:
            last = now
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    # what was in flight at the edges counts with its part
    busy = [(min(b, last) - max(a, first), good) for a, b, good in spans if b > first and a < last]
    whole = max(1e-9, workers * (last - first))
    used, good = sum(s for s, _ in busy), sum(s for s, ok in busy if ok)
    return Night(used / whole, good / whole, failed / total, total, cpu, wall, tuple(memory))


def resident() -> float:
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def shares(seeds: int) -> list[str]:
    """Tables of utilisation, and of what the time limit costs."""
    lines = []
    limited = "With the default limit, 4 x the median: the 2 % that take 5 x are killed twice, and fail"
    ahead = "Pipelined, each generation asked before the last results of the one before, without a time limit"
    tables = (
        (NEVER, EACH, "Without a time limit", False),
        (NEVER, EACH, ahead, True),
        (Limits(), (4,), limited, False),
    )
    for limits, each_of, title, pipelined in tables:
        lines += [
            "",
            f"{title}. Busy share of the workers' time, in brackets what gave a score; candidates of all "
            "islands for each worker:",
            "",
        ]
        lines += [
            "| workers | islands | " + " | ".join(f"{each} a worker" for each in each_of) + " |",
            "| ---: | ---: |" + " ---: |" * len(each_of),
        ]
        for workers in WORKERS:
            for islands in ISLANDS:
                cells = [cell(workers, islands, each, limits, seeds, pipelined) for each in each_of]
                lines.append(f"| {workers} | {islands} | " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    return lines


def cell(workers: int, islands: int, each: int, limits: Limits, seeds: int, pipelined: bool) -> str:
    """The mean over seeds; one seed does for a thousand workers."""
    population = max(4, each * workers // islands)
    generations = max(12, min(200, 4000 // population)) if workers < 1024 else 10
    nights = [
        simulate(workers, islands, population, generations, limits, s, pipelined=pipelined)
        for s in range(seeds if workers < 1024 else 1)
    ]
    busy, useful = (sum(getattr(n, name) for n in nights) / len(nights) for name in ("busy", "useful"))
    return f"{busy:.0%} ({useful:.0%}), population {population}"


def delay() -> list[str]:
    """What it costs to learn a generation later."""
    what = (
        f"{GAIN:g} times nearer to the best of an ellipsoid of {GENES} genes (condition 100), median of "
        f"{SEEDS} seeds"
    )
    lines = ["", f"Evaluations that a CMA-ES takes to come {what}:"]
    lines += ["", "| population | evaluations | pipelined | more |", "| ---: | ---: | ---: | ---: |"]
    for population in (16, 32, 64):
        plain, pipelined = (
            median(taken(population, ahead, seed) for seed in range(SEEDS)) for ahead in (0, 1)
        )
        lines.append(f"| {population} | {plain:,.0f} | {pipelined:,.0f} | {pipelined / plain - 1:.0%} |")
        print(lines[-1], flush=True)
    return lines


def taken(population: int, ahead: int, seed: int) -> int:
    """Evaluations until the mean of the distribution has the share 1 / GAIN of the loss that it began
    with.
    """
    weights = np.logspace(0, 2, GENES)
    es = CmaEs([0.0] * GENES, 0.15, population=population, diagonal=True, seed=seed)

    def loss(genome: Array) -> float:
        return float(np.sum(weights * (genome - 0.5) ** 2))

    asked, count, first = [es.ask() for _ in range(1 + ahead)], 0, loss(es.mean)
    while loss(es.mean) > first / GAIN:
        genomes = asked.pop(0)
        es.tell(genomes, [-loss(g) for g in genomes])
        count += population
        asked.append(es.ask())
    return count


def load(evaluations: int) -> list[str]:
    """Dispatch and memory over many evaluations, with 4,000 workers."""
    night = simulate(4000, 8, 2000, max(2, math.ceil(evaluations / 16_000)), NEVER, 0, shares=False)
    memory = ", ".join(f"{m:.0f}" for m in night.memory)
    print("load", night.cpu, night.wall, memory, flush=True)
    return [
        "",
        f"One driver, 4,000 workers, 8 islands of 2,000: {night.evaluations:,} evaluations in "
        f"{night.cpu:.0f} s of one core "
        f"({night.wall:.0f} s by the clock, beside other programs), the simulation's own work included: "
        f"**{night.evaluations / night.cpu:,.0f} candidates/s** of a core, "
        f"{night.evaluations / night.wall:,.0f}/s by the clock.",
        f"Memory of the process at each tenth of them, MiB: {memory}.",
    ]


class Sleeper:
    """A worker that takes the time that the recipe's seed says, and does nothing."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        if self.seconds:
            time.sleep(law(0, recipe.seed, self.seconds))
        return Evaluation(recipe.id, (), {"task": 1.0}, {})


def search(pool: Pool, islands: int, population: int, generations: int, pipelined: bool = False) -> None:
    """The driver's side on a real pool, candidates told apart by their seeds."""
    crowd = Islands(islands, population, generations, pipelined)

    def own(jobs: list[Job]) -> list[Job]:
        return [replace(job, recipe=replace(RECIPE, seed=job.slot)) for job in jobs]

    pool.submit(own(crowd.begin()))
    while pool.out:
        found = pool.result(1.0)
        if found is not None:
            pool.submit(own(crowd.ended(found[0].slot)))
            pool.attempts()


def real(generations: int = 36) -> list[str]:
    """Two Ray workers on this machine."""
    from evomerge.workers.ray_pool.pool import RayPool

    lines = ["", "Two real Ray workers on this machine, candidates that sleep .2 s by the same law:", ""]
    lines += [
        "| islands | pipelined | population | evaluations | busy |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    with RayPool(functools.partial(Sleeper, 0.2), address="local", workers=2) as pool:
        ready(pool)
        for islands, population, pipelined in (
            (1, 8, False),
            (1, 8, True),
            (1, 12, False),
            (2, 8, False),
            (2, 12, False),
            (4, 8, False),
        ):
            before, each = pool.usage(), max(1, generations // islands)
            search(pool, islands, population, each, pipelined)
            used = pool.usage()
            busy = sum(u.busy - before[name].busy for name, u in used.items()) / sum(
                u.alive - before[name].alive for name, u in used.items()
            )
            lines.append(
                f"| {islands} | {'yes' if pipelined else 'no'} | {population} | "
                f"{islands * population * each} | {busy:.1%} |"
            )
            print(lines[-1], flush=True)
    with RayPool(functools.partial(Sleeper, 0.0), address="local", workers=2) as pool:
        ready(pool)
        jobs = 4000
        cpu, wall = time.process_time(), time.perf_counter()
        search(pool, 1, jobs, 1)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    lines += [
        "",
        f"{jobs:,} candidates that take no time, through the same pool with two workers: "
        f"{jobs / wall:,.0f}/s by the clock (driver, Ray, workers "
        f"and other programs share two cores), {jobs / cpu:,.0f} for each second of the driver's own "
        "processor time.",
        f"Load of the machine (processes that want a core) at the end: {os.getloadavg()[0]:.1f}.",
    ]
    print(lines[-2], flush=True)
    return lines


def ready(pool: Any) -> None:
    """Waits until both workers can be given something."""
    pool.submit([Job(0, RECIPE, ITEMS)])
    while pool.out or pool.ready < 2:
        if not pool.out:
            pool.submit([Job(0, RECIPE, ITEMS)])
        pool.result(1.0)
    pool.attempts()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", action="store_true", help="two real Ray workers too")
    parser.add_argument(
        "--only-real", action="store_true", help="nothing else; the file keeps its other parts"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--evaluations", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "cluster.md")
    args = parser.parse_args()
    logging.getLogger("evomerge.workers.scheduler").setLevel(
        logging.ERROR
    )  # a limit that is passed is a number here, no news
    if not args.only_real:
        head = ["# Workers kept busy", "", " ".join((__doc__ or "").split("\n\n")[1].split())]
        simulated = ["## Simulated", "", stamp(), *shares(args.seeds), *delay(), *load(args.evaluations)]
        args.out.write_text("\n".join([*head, "", *simulated]) + "\n")
    if args.real or args.only_real:
        kept = args.out.read_text().partition("\n## Real")[0].rstrip()
        args.out.write_text("\n".join([kept, "", "## Real", "", stamp("ray"), *real()]) + "\n")


def stamp(*packages: str) -> str:
    """What was run, when and with what."""
    command = shlex.join(["python", "scripts/benchmarks/cluster.py", *sys.argv[1:]])
    return f"`{command}`, {machine.stamp(*packages)}."


if __name__ == "__main__":
    main()
