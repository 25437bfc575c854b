"""A run in the terminal: one line a stage, with what it did, how far it is and the time left. All else is in the log file."""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterName,
    LogFilter,
    LogFilterFlowRunId,
    LogFilterTimestamp,
)
from prefect.client.schemas.objects import FlowRun, Log, StateType, TaskRun
from prefect.client.schemas.sorting import LogSort
from rich.console import Console
from rich.live import Live
from rich.text import Text

from tasks.stages import parse_outcome
from textcraftor.progress import LINE

PAGE = 200  # logs in a request
LATE = timedelta(seconds=30)  # how much later than a log of the same moment another one may arrive
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
AGAIN = 300.0  # seconds between two reports of the running stages where there is no terminal


@dataclass
class Stage:
    """A stage of the run. counter: what is counted, since when, how many are done, of how many."""

    name: str
    state: str = "PENDING"
    started: datetime | None = None
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    counter: tuple[str, datetime, int, int] | None = None

    def read(self, log: Log) -> None:
        """Take in a line that the stage printed."""
        self.lines.append(log.message)
        if found := re.match(LINE, log.message):
            what, done, total = found["what"], int(found["done"]), int(found["total"])
            same = self.counter is not None and self.counter[0] == what
            since = self.counter[1] if self.counter and same else self._counting_since(log.timestamp)
            self.counter = (what, since, done, total)

    @property
    def ended(self) -> bool:
        """Whether the stage has ended and its last line is here, after which its outcome is known. Logs arrive late."""
        return self.state in ENDED and any(line.startswith("Finished in state") for line in self.lines)

    def describe(self) -> str:
        """One line: name, outcome or progress, time."""
        if self.state == "COMPLETED":
            return f"{self.name:<22} {parse_outcome(self.name, self.lines):<24} {duration(self.seconds):>8}"
        if self.state in ENDED:
            return f"{self.name:<22} {self.state.lower():<24} {duration(self.seconds):>8}"
        if not self.counter:
            return f"{self.name:<22} {'...':<24} {duration(self.seconds):>8}"
        what, since, done, total = self.counter
        elapsed = self.seconds - (since - self.started).total_seconds() if self.started else 0.0
        left = f"{duration(elapsed / done * (total - done))} left" if done and elapsed > 0 else ""
        return f"{self.name:<22} {f'{what} {done:,}/{total:,}':<24} {duration(self.seconds):>8}   {left}".rstrip()

    def _counting_since(self, now: datetime) -> datetime:
        """The first line of a counter comes late; it began when the one before it ended, or with the stage."""
        return now if self.counter else self.started or now


class RunView:
    """The stages of a flow run, as the server knows them."""

    def __init__(self, client: SyncPrefectClient, name: str):
        self.client, self.name = client, name
        self.stages: dict[UUID, Stage] = {}
        self.waiting = False  # for another run of the same deployment
        self.review = ""  # address of the page on which a person is to decide; empty while nobody is
        self._seen: set[UUID] = set()
        self._since: datetime | None = None

    def refresh(self) -> None:
        """Read what happened since the last call."""
        if (run := self._run()) is None:
            return
        self.waiting = run.state_name == "AwaitingConcurrencySlot"
        suspended = run.state_type == StateType.PAUSED
        self.review = (
            f"{str(self.client.api_url).removesuffix('/').removesuffix('/api')}/runs/flow-run/{run.id}" if suspended else ""
        )
        for task_run in self._task_runs(run.id):
            stage = self.stages.setdefault(task_run.id, Stage(task_run.name))
            stage.name, stage.started = task_run.name, task_run.start_time
            stage.state = task_run.state_type.value if task_run.state_type else stage.state
            stage.seconds = task_run.estimated_run_time.total_seconds()
        for log in self._new_logs(run.id):
            if log.task_run_id in self.stages:
                self.stages[log.task_run_id].read(log)

    @property
    def begun(self) -> list[Stage]:
        """The stages that have started, in that order."""
        return sorted((stage for stage in self.stages.values() if stage.started), key=lambda stage: str(stage.started))

    def _run(self) -> FlowRun | None:
        found = self.client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[self.name])))
        return found[0] if found else None

    def _task_runs(self, run_id: UUID) -> Iterator[TaskRun]:
        """The task runs that are stages: `repro` runs no other."""
        for task_run in self.client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))):
            if task_run.task_key.startswith("repro") and task_run.start_time:
                yield task_run

    def _new_logs(self, run_id: UUID) -> Iterator[Log]:
        of_run = LogFilterFlowRunId(any_=[run_id])
        after = LogFilterTimestamp(after_=self._since - LATE) if self._since else None
        for offset in range(0, 100 * PAGE, PAGE):
            page = self.client.read_logs(
                LogFilter(flow_run_id=of_run, timestamp=after), limit=PAGE, offset=offset, sort=LogSort.TIMESTAMP_ASC
            )
            for log in page:
                self._since = max(self._since or log.timestamp, log.timestamp)
                if log.id not in self._seen:
                    self._seen.add(log.id)
                    yield log
            if len(page) < PAGE:
                return


class Terminal:
    """Prints a line when a stage has ended, and the running ones: on a terminal below it, live; elsewhere now and then."""

    def __init__(self, view: RunView, console: Console) -> None:
        self.view, self.console = view, console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._printed: set[int] = set()
        self._reported = time.monotonic()
        self._said_waiting = self._said_review = False

    def __enter__(self) -> "Terminal":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def finish(self) -> None:
        """Show all of a run that has ended, as soon as its logs are here."""
        deadline = time.monotonic() + 10
        while not all(stage.ended for stage in self.view.begun) and time.monotonic() < deadline:
            self.view.refresh()
            time.sleep(0.3)
        self.show(last=True)

    def show(self, last: bool = False) -> None:
        """Read and show what happened."""
        self.view.refresh()
        if self.view.waiting and not self._said_waiting:
            self._said_waiting = True
            self._print("Another run of this project goes first; this one starts when it has ended.")
        if self.view.review and not self._said_review:
            self._said_review = True
            self._print(f"A person decides, in the form behind Resume:\n{self.view.review}")
        running = [stage for stage in self.view.begun if not (stage.ended or last)]
        if self._live:
            self._live.update(Text("\n".join(stage.describe() for stage in running), no_wrap=True, overflow="ellipsis"))
        for stage in self.view.begun:
            if (stage.ended or last) and id(stage) not in self._printed:
                self._printed.add(id(stage))
                self._print(stage.describe())
        if self._live:
            self._live.refresh()
        elif time.monotonic() - self._reported >= AGAIN:
            self._reported = time.monotonic()
            for stage in running:
                self._print(stage.describe())

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def opened(name: str) -> Iterator[Terminal]:
    """The terminal of a run, by its name, on the server of the environment."""
    with get_client(sync_client=True) as client, Terminal(RunView(client, name), Console()) as terminal:
        yield terminal


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 12 min, 3 h 05."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d}"
