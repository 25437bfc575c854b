"""Runs the jobs of a table, a few at a time, with progress and the time that is left. What is done is not done again."""

import re
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from textcraftor.ablation import workspaces
from textcraftor.ablation.plan import Job, Planned
from textcraftor.progress import LINE

SECONDS: Final = 20.0  # between two lines about what is running


class Runner:
    """Runs jobs.

    params: what the run's params.yaml holds.  at_once: jobs at the same time.  device: for the verbs.
    """

    def __init__(self, params: dict[str, Any], at_once: int, device: str, console: Console) -> None:
        self.params, self.at_once, self.device, self.console = params, at_once, device, console
        self._rates: dict[str, float] = {}  # kind of job -> seconds for a size of 1
        self._shown: dict[Path, str] = {}

    def run(self, name: str, planned: Sequence[Planned]) -> None:
        """Run all that is not done yet, first what evaluations wait for. Raises SystemExit when a verb fails.

        Left by an exception, Ctrl-C among them, it lets trainings write their checkpoints; the next call resumes them.
        """
        evaluations = {each.evaluation.folder: each.evaluation for each in planned if each.evaluation}
        every = {job.folder: job for each in planned for job in each.jobs}
        first = [job for folder, job in every.items() if folder not in evaluations]
        pending = [job for job in every.values() if job.remaining]
        self._say(f"{name}: {len(every)} jobs, {len(every) - len(pending)} done already")
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                for phase in (first, list(evaluations.values())):
                    self._run_phase(name, [job for job in phase if job.remaining], pool, pending)
            except BaseException:
                workspaces.stop()
                raise

    def _run_phase(self, name: str, jobs: Sequence[Job], pool: ThreadPoolExecutor, pending: list[Job]) -> None:
        running: dict[Future[float], Job] = {pool.submit(self._run_job, job): job for job in jobs}
        while running:
            done, _ = wait(running, timeout=SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                seconds = future.result()
                pending.remove(job)
                self._rates[job.kind] = seconds / job.size
                self._say(f"{name}: {job.what}, {seconds:.0f} s; {len(pending)} to do{self._left(pending)}")
            if not done:
                self._show_running(running.values())

    def _run_job(self, job: Job) -> float:
        """Seconds that it took now."""
        started = time.monotonic()
        params = workspaces.make(job.folder, self.params, job.settings, job.links)
        for step in job.remaining:
            workspaces.run(params, *step.arguments, "--device", self.device)
        return time.monotonic() - started

    def _left(self, pending: Sequence[Job]) -> str:
        """The time that pending jobs will take; nothing while a kind of them has not been timed yet."""
        if not pending or any(job.kind not in self._rates for job in pending):
            return ""
        seconds = sum(job.size * self._rates[job.kind] for job in pending) / min(self.at_once, len(pending))
        return f", about {max(1, round(seconds / 60))} min left"

    def _show_running(self, jobs: Sequence[Job] | Any) -> None:
        """The last progress line of each job that has a new one."""
        for job in jobs:
            log = job.folder / workspaces.LOG
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
            last = next((line for line in reversed(lines) if re.match(LINE, line)), "")
            if last and self._shown.get(job.folder) != last:
                self._shown[job.folder] = last
                self._say(f"  {job.what}: {last}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)
