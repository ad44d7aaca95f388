"""Work spread over processes: `torchrun --nproc-per-node 4 -m longrope search ...`.

Rank 0 leads: it alone has the run directory and decides what is done; the others are its crew. It gives them one job
after another, each with keys of its own in the key-value store: forwards of a model, or a training (`tune.ranks`).

Of forwards, what is to be scored next is announced there; whoever is free claims one by one atomic compare-and-set and
puts its record there, which the leader logs at once. The leader works too, and at the end waits for the rest.

There is no collective, so no rank can hang another. A rank that is killed stops its heartbeat; the leader runs again
what it had claimed, and nothing else is lost. The leader's own death ends the job, and its log resumes it, on any
number of ranks. (torchrun ends all ranks when one dies; with --max-restarts it starts them anew, and the log resumes.)
A training needs every rank, and is not begun without.

Scores do not depend on who computed them where all ranks run alike (processor, dtype, threads), so a budget in
evaluations gives the same run for any number of ranks. One in time counts seconds of forwards, of all ranks together.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import longrope_kernels as lk

from . import data, models
from .errors import PipelineError, one_line, refuse
from .run import EvaluationLog

POLL_SECONDS = 0.05
BEAT_SECONDS = 0.5
PATIENCE_SECONDS = 10.0  # without a heartbeat, after which a rank counts as dead
STARTING_SECONDS = 600.0  # in which a rank of which nothing was seen may still come
JOB, COUNT, DONE = "longrope/job", "longrope/count", "longrope/done"
FORWARDS, TRAINING, END = "forwards", "training", "end"  # kinds of jobs


@dataclass(frozen=True)
class Forward:
    """One forward of the first `length` tokens of a window under `rope`, scored from index `start` on.

    Attributes:
        about: further fields for the log.
    """

    window: data.Window
    rope: lk.LongRope
    length: int
    start: int
    about: dict[str, Any] = field(default_factory=dict)


def rank() -> tuple[int, int]:
    """Return this process's rank and how many there are, as torchrun says; (0, 1) without it."""
    found = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
        value = os.environ.get(name, default)
        if not value.isdecimal():
            refuse(name, repr(value), "a number, as torchrun sets it")
        found.append(int(value))
    return found[0], found[1]


def meet() -> Any:
    """Return the key-value store of the job, which MASTER_ADDR and MASTER_PORT name."""
    import torch.distributed as dist

    try:
        store = next(iter(dist.rendezvous("env://")))[0]
    except (ValueError, RuntimeError) as error:
        line = one_line(f"MASTER_ADDR: got {error}, expected the address of rank 0, as torchrun sets it")
        raise PipelineError(line) from error
    # Where torchrun starts all ranks anew, its store still has the claims of those that are gone.
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


class Crew:
    """The ranks above 0, as rank 0 sees them: they do one job after another, and are sent home at the end.

    Args:
        patience: seconds without a heartbeat after which a rank counts as dead.
    """

    def __init__(self, store: Any, ranks: int, patience: float = PATIENCE_SECONDS) -> None:
        self.store, self.ranks, self.patience = store, ranks, patience
        self.jobs = 0
        self.began = time.monotonic()
        self.beats: dict[int, tuple[bytes, float]] = {}  # by rank: the last heartbeat, and when it came

    def begin(self, kind: str, job: dict[str, Any]) -> Any:
        """Give out a job, which those who are busy come to later; return its part of the store."""
        self.jobs += 1
        store = part_of(self.store, self.jobs)
        store.set(JOB, json.dumps({"kind": kind, **job}))
        return store

    def lead(self, job: dict[str, Any], log: EvaluationLog) -> Leader:
        """Give out forwards.

        Args:
            job: what they must agree with: model (None: that of their own command line), its fingerprint, dtype and
                original length, and the length `before` which it is taken, see `Hand`.
            log: gets every record, in the order in which they come in.
        """
        return Leader(self, job, log)

    def train(self, job: dict[str, Any]) -> None:
        """Give out a training, and return when every rank is at it.

        Raises:
            PipelineError: a rank is gone; one line names it.
        """
        store = self.begin(TRAINING, job)
        for rank in range(1, self.ranks):
            while not store.check([_here(rank)]):
                late = not self.beats.get(rank) and time.monotonic() - self.began > STARTING_SECONDS
                if not self.alive(rank) and (self.beats.get(rank) or late):
                    raise PipelineError(
                        f"rank {rank}: got no sign of life for {self.patience:g} seconds, expected it to train; "
                        "what was finished is kept, run the same command again"
                    )
                time.sleep(POLL_SECONDS)

    def alive(self, rank: int) -> bool:
        """Whether a rank has been seen, and its heart beats."""
        name = f"longrope/beat/{rank}"
        beat = self.store.get(name) if self.store.check([name]) else b""
        if beat and beat != self.beats.get(rank, (b"", 0.0))[0]:
            self.beats[rank] = (beat, time.monotonic())
        return rank in self.beats and time.monotonic() - self.beats[rank][1] < self.patience

    def wait_for_leave(self, store: Any) -> None:
        """Wait until those alive have left a job, as long as patience lasts."""
        until = time.monotonic() + self.patience
        while time.monotonic() < until and any(
            not store.check([_left(rank)]) and self.alive(rank) for rank in range(1, self.ranks)
        ):
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Send all home, and wait until those alive have heard it: the store may end with this process."""
        self.wait_for_leave(self.begin(END, {}))


class Leader:
    """Announces forwards, takes their records, and works on what nobody else has claimed; see `Crew.lead`."""

    def __init__(self, crew: Crew, job: dict[str, Any], log: EvaluationLog) -> None:
        self.crew, self.log = crew, log
        self.count = 0  # forwards announced, which are numbered
        self.waiting: dict[str, tuple[int, Forward]] = {}  # by key in the log, which does not have them yet
        self.windows: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.store = crew.begin(FORWARDS, job)
        self._collector = threading.Thread(target=self._collect, daemon=True)
        self._collector.start()

    def announce(self, forwards: Iterable[tuple[str, Forward]]) -> None:
        """Offer forwards, with their keys in the log, to whoever is free; what the log has is left out."""
        for key, forward in forwards:
            if key in self.waiting or self.log.get(key) is not None:
                continue
            window = forward.window.describe()["tokens_sha256"]
            if window not in self.windows:
                self.windows.add(window)
                self.store.set(f"longrope/window/{window}", json.dumps(forward.window.tokens))
            task = {"window": window, "rope": forward.rope.to_dict(), "length": forward.length, "start": forward.start}
            fields = {**forward.about, "window": forward.window.name}
            self.store.set(f"longrope/task/{self.count}", json.dumps({**task, "fields": fields}))
            with self._lock:
                self.waiting[key] = self.count, forward
            self.count += 1
            self.store.add(COUNT, 1)

    def take(self, key: str, forward: Forward, run: Callable[[str, Forward], object]) -> None:
        """Return once the log has a record of `key`.

        Args:
            run: runs a forward in this process and logs it: this one where nobody else does, and others that are
                announced while somebody does.
        """
        while self.log.get(key) is None:
            if self._error is not None:
                raise self._error
            waiting = self._open()
            if self.log.get(key) is not None:
                return
            if key not in waiting or self._free(waiting[key][0]):
                run(key, forward)
                return
            other = next((one for one, (number, _) in waiting.items() if claim(self.store, number, 0)), None)
            if other is None:
                time.sleep(POLL_SECONDS)
            else:
                run(other, waiting[other][1])

    def close(self) -> None:
        """Say that this was all, and log what those alive still bring."""
        self.store.set(DONE, "1")
        self.crew.wait_for_leave(self.store)
        self._stop.set()
        self._collector.join()

    def _open(self) -> dict[str, tuple[int, Forward]]:
        with self._lock:
            return {key: one for key, one in self.waiting.items() if self.log.get(key) is None}

    def _free(self, number: int) -> bool:
        """Whether this process is to run a forward: nobody had claimed it, or somebody who is dead."""
        owner = int(self.store.compare_set(f"longrope/claim/{number}", "", "0"))
        return owner == 0 or not self.crew.alive(owner)

    def _collect(self) -> None:
        """Log what comes in until closed."""
        try:
            while not self._stop.wait(POLL_SECONDS):
                with self._lock:
                    waiting = list(self.waiting.items())
                for key, (number, _) in waiting:
                    name = f"longrope/result/{number}"
                    if self.store.check([name]):
                        self.log.append_once(key, json.loads(self.store.get(name)))
                    if self.log.get(key) is not None:
                        self.store.delete_key(f"longrope/task/{number}")
                        self.store.delete_key(name)
                        with self._lock:
                            del self.waiting[key]
        except BaseException as error:  # raised where the main thread waits
            self._error = error


class Hand:
    """One of the crew: does what rank 0 gives out, one job after another, until it is sent home.

    Args:
        model: as rank 0 was given it.
        run: runs a forward and returns its record.
        train: trains along with the other ranks what a job of `Crew.train` says, on the model that it is given.
    """

    def __init__(
        self,
        model: str,
        run: Callable[[models.LoadedModel, Forward], dict[str, Any]],
        train: Callable[[models.LoadedModel, dict[str, Any]], None],
        threads: int | None = None,
    ) -> None:
        self.model, self.run, self.train, self.threads = model, run, train, threads
        self.own, _ = rank()
        self._loaded: tuple[tuple[str, ...], models.LoadedModel] | None = None

    def serve(self, store: Any) -> None:
        """Work until rank 0 has no more to do.

        Raises:
            UsageError: a model here is another than the leader's; one line.
            PipelineError: the leader is gone, or a rank that trains; one line.
        """
        import torch.distributed as dist

        stop = threading.Event()
        beating = threading.Thread(target=_beat, args=(store, self.own, stop), daemon=True)
        beating.start()
        try:
            for number in itertools.count(1):
                part = part_of(store, number)
                job = json.loads(_when_there(part, JOB))
                if job["kind"] == FORWARDS:
                    self._forwards(part, job)
                elif job["kind"] == TRAINING:
                    self._training(part, job)
                part.set(_left(self.own), "1")
                if job["kind"] == END:
                    return
        except dist.DistError as error:
            raise PipelineError(f"rank {self.own}: got no more answers from rank 0, expected it to run") from error
        finally:
            stop.set()
            beating.join()

    def _forwards(self, store: Any, job: dict[str, Any]) -> None:
        if store.check([DONE]):
            return
        loaded = self._load(job)
        windows: dict[str, tuple[int, ...]] = {}
        number = 0
        while not store.check([DONE]):
            if number >= store.add(COUNT, 0):
                time.sleep(POLL_SECONDS)
                continue
            name = f"longrope/task/{number}"
            if store.check([name]) and claim(store, number, self.own):  # gone where it is done: a rank may start late
                task = json.loads(store.get(name))
                name = task["window"]
                if name not in windows:
                    windows[name] = tuple(json.loads(store.get(f"longrope/window/{name}")))
                window = data.Window("", "", 0, 0, windows[name])
                rope = lk.LongRope.from_dict(task["rope"])
                record = self.run(loaded, Forward(window, rope, task["length"], task["start"]))
                store.set(f"longrope/result/{number}", json.dumps({**record, **task["fields"], "rank": self.own}))
            number += 1

    def _training(self, store: Any, job: dict[str, Any]) -> None:
        store.set(_here(self.own), "1")
        loaded, self._loaded = self._load(job), None  # its weights will be others
        try:
            self.train(loaded, job)
        except RuntimeError as error:  # what a collective raises where a rank has gone
            line = f"rank {self.own}: got {error} in a training, expected all ranks to go on"
            raise PipelineError(one_line(line, 300)) from error

    def _load(self, job: dict[str, Any]) -> models.LoadedModel:
        name = self.model if job["model"] is None else job["model"]
        found = models.fingerprint(models.find(name))
        if found != job["model_fingerprint"]:
            expected = f"{job['model_fingerprint']}, as on rank 0"
            refuse("MODEL", f"{name} with fingerprint {found} on rank {self.own}", expected)
        key = (found, job["dtype"], f"{job['original_length']} {job.get('before')}")
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # before there is another
            loaded = models.load(name, job["dtype"], job["original_length"], self.threads)
            if job.get("before") is not None:
                loaded.rope = models.before(loaded.rope, job["before"])
            self._loaded = key, loaded
        return self._loaded[1]


def part_of(store: Any, number: int) -> Any:
    """Return the part of the store that a job has for itself; jobs are numbered from 1."""
    import torch.distributed as dist

    return dist.PrefixStore(f"job {number}", store)


def _here(rank: int) -> str:
    return f"longrope/here/{rank}"


def _left(rank: int) -> str:
    return f"longrope/left/{rank}"


def claim(store: Any, number: int, rank: int) -> bool:
    """Claim a forward; True for one rank alone."""
    return bool(store.compare_set(f"longrope/claim/{number}", "", str(rank)) == str(rank).encode())


def _beat(store: Any, own: int, stop: threading.Event) -> None:
    count = 0
    while not stop.is_set():
        count += 1
        try:
            store.set(f"longrope/beat/{own}", str(count))
        except Exception:  # the store is gone: the main thread finds that out by itself
            return
        stop.wait(BEAT_SECONDS)


def _when_there(store: Any, name: str) -> bytes:
    """Return a value once it is there."""
    while not store.check([name]):
        time.sleep(POLL_SECONDS)
    return bytes(store.get(name))
