"""What a study is, and how one is run: seeds in parallel processes, then the comparisons, then a page."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from kdq.bench.runner import torch_threads
from kdq.studies.paired import Difference, Outcome, compare
from kdq.studies.tasks import TASKS, Task

QUICK_STEPS = 16  # enough for every precision of a switchable student to have its turn


@dataclass(frozen=True)
class Metric:
    """A value of an Outcome: its name there, what it is called, and whether more (+1) or less (-1) of it is better."""

    key: str
    label: str
    better: int
    digits: int = 2


ACCURACY = Metric("accuracy", "accuracy, points", +1)
KL = Metric("teacher_kl", "KL to the teacher, nats", -1, digits=3)


@dataclass(frozen=True)
class Comparison:
    """A question put to every group: is `arm` better than `against`?

    Attributes:
        why: what the answer hangs on, in a sentence or two.
        groups: where to ask; None: wherever both arms are.
    """

    title: str
    arm: str
    against: str
    why: str
    metrics: Sequence[Metric] = (ACCURACY, KL)
    groups: Sequence[str] | None = None


@dataclass(frozen=True)
class Study:
    """An experiment.

    Attributes:
        run_seed: all outcomes of one seed of a task, trained for `steps` steps an arm; runs in a process of its own.
        steps: of an arm.
        method: paragraphs for the page.
        tasks: names of those it runs on.
        section: one of Markdown before the method, made of all outcomes.
        appendix: a section of Markdown, made after the seeds, in this process, on one thread; given `quick`.
        picture: draws the findings to a path, instead of `document.plot`.
    """

    name: str
    title: str
    claim: str
    method: str
    comparisons: Sequence[Comparison]
    run_seed: Callable[[Task, int, int], list[Outcome]]
    steps: int = 600
    appendix: Callable[[bool], str] | None = None
    section: Callable[[Sequence[Outcome]], str] | None = None
    tasks: Sequence[str] = tuple(TASKS)
    picture: Callable[[Findings, Path], None] | None = None


@dataclass(frozen=True)
class Answer:
    """A comparison's result in one group of one task by one metric."""

    comparison: Comparison
    task: str
    group: str
    metric: Metric
    difference: Difference

    @property
    def verdict(self) -> str:
        return self.difference.verdict(self.metric.better)


@dataclass(frozen=True)
class Findings:
    """A study that has been run.

    Attributes:
        seconds: of a clock.
        processor_seconds: of all processes together: what it costs on a machine that nobody else uses.
    """

    study: Study
    outcomes: list[Outcome]
    answers: list[Answer]
    seeds: int
    steps: int
    seconds: float
    processor_seconds: float
    processes: int
    appendix: str


def run_study(study: Study, seeds: int, *, quick: bool = False, processes: int | None = None) -> Findings:
    """Runs all seeds of all its tasks, a process each, one thread a process.

    Args:
        quick: a few steps only, to see that everything works.
        processes: at a time; None: one a core.

    Raises:
        ValueError: fewer than one seed.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    start, used = time.perf_counter(), processor_seconds()
    workers = min(processes or len(os.sched_getaffinity(0)), seeds * len(study.tasks))
    steps = QUICK_STEPS if quick else study.steps
    outcomes: list[Outcome] = []
    # Forked threads of torch hang; a spawned process starts anew.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, Progress(transient=True) as progress:
        jobs = [pool.submit(_run_job, study, name, seed, steps, quick) for seed in range(seeds) for name in study.tasks]
        bar = progress.add_task(study.name, total=len(jobs))
        for job in as_completed(jobs):
            outcomes += job.result()
            progress.advance(bar)
    outcomes.sort(key=lambda o: (o.task, o.seed))
    appendix = ""
    if study.appendix is not None:
        with torch_threads():
            torch.set_num_threads(1)
            appendix = study.appendix(quick)
    seconds, used = time.perf_counter() - start, processor_seconds() - used
    return Findings(study, outcomes, answer(study, outcomes), seeds, steps, seconds, used, workers, appendix)


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _run_job(study: Study, task: str, seed: int, steps: int, quick: bool) -> list[Outcome]:
    torch.set_num_threads(1)
    return study.run_seed(TASKS[task].quick() if quick else TASKS[task], seed, steps)


def answer(study: Study, outcomes: Sequence[Outcome]) -> list[Answer]:
    """Every comparison, in every task, group and metric that it applies to."""
    answers = []
    for comparison in study.comparisons:
        for task in dict.fromkeys(o.task for o in outcomes):
            arms: dict[str, set[str]] = {}
            for o in outcomes:
                if o.task == task:
                    arms.setdefault(o.group, set()).add(o.arm)
            both = [g for g, names in arms.items() if {comparison.arm, comparison.against} <= names]
            for group in both if comparison.groups is None else [g for g in both if g in comparison.groups]:
                for metric in comparison.metrics:
                    found = compare(outcomes, task, group, comparison.arm, comparison.against, metric.key)
                    answers.append(Answer(comparison, task, group, metric, found))
    return answers
