"""Forwards spread over processes: `torchrun --nproc-per-node 4 -m longrope search ...`.

Rank 0 leads: it alone has the run directory and decides what is scored; the others load the model and work. What is to
be scored next is announced in the job's key-value store; whoever is free claims a forward by one atomic compare-and-set
and puts its record there, which the leader logs at once. The leader works too, and at the end waits for the rest.

There is no collective, so no rank can hang another. A rank that is killed stops its heartbeat; the leader runs again
what it had claimed, and nothing else is lost. The leader's own death ends the job, and its log resumes it, on any
number of ranks. (torchrun ends all ranks when one dies; with --max-restarts it starts them anew, and the log resumes.)

Scores do not depend on who computed them where all ranks run alike (processor, dtype, threads), so a budget in
evaluations gives the same run for any number of ranks. One in time counts seconds of forwards, of all ranks together.
"""

from __future__ import annotations

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
JOB, COUNT, DONE = "longrope/job", "longrope/count", "longrope/done"


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


class Leader:
    """Announces forwards, takes their records, and works on what nobody else has claimed.

    Args:
        job: what the workers must agree with: fingerprint of the model, dtype and original length, see `serve`.
        log: gets every record, in the order in which they come in.
        patience: seconds without a heartbeat after which a rank counts as dead.
    """

    def __init__(
        self, store: Any, ranks: int, job: dict[str, Any], log: EvaluationLog, patience: float = PATIENCE_SECONDS
    ) -> None:
        self.store, self.ranks, self.log, self.patience = store, ranks, log, patience
        self.count = 0  # forwards announced, which are numbered
        self.waiting: dict[str, tuple[int, Forward]] = {}  # by key in the log, which does not have them yet
        self.windows: set[str] = set()
        self.beats: dict[int, tuple[bytes, float]] = {}  # by rank: the last heartbeat, and when it came
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        store.set(JOB, json.dumps(job))
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
        """Send the workers home, and wait until those alive have heard it: the store may end with this process."""
        self.store.set(DONE, "1")
        until = time.monotonic() + self.patience
        while time.monotonic() < until and any(
            not self.store.check([f"longrope/left/{rank}"]) and self._alive(rank) for rank in range(1, self.ranks)
        ):
            time.sleep(POLL_SECONDS)
        self._stop.set()
        self._collector.join()

    def _open(self) -> dict[str, tuple[int, Forward]]:
        with self._lock:
            return {key: one for key, one in self.waiting.items() if self.log.get(key) is None}

    def _free(self, number: int) -> bool:
        """Whether this process is to run a forward: nobody had claimed it, or somebody who is dead."""
        owner = int(self.store.compare_set(f"longrope/claim/{number}", "", "0"))
        return owner == 0 or not self._alive(owner)

    def _alive(self, rank: int) -> bool:
        beat, since = self.beats.get(rank, (b"", 0.0))
        return bool(beat) and time.monotonic() - since < self.patience

    def _collect(self) -> None:
        """Log what comes in, and note heartbeats, until closed."""
        try:
            while not self._stop.wait(POLL_SECONDS):
                for rank in range(1, self.ranks):
                    name = f"longrope/beat/{rank}"
                    beat = self.store.get(name) if self.store.check([name]) else b""
                    if beat != self.beats.get(rank, (b"", 0.0))[0]:
                        self.beats[rank] = (beat, time.monotonic())
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


def serve(model: str, run: Callable[[models.LoadedModel, Forward], dict[str, Any]], threads: int | None = None) -> None:
    """Work for rank 0 until it has no more to do.

    Args:
        model: as rank 0 was given it.
        run: runs a forward and returns its record.

    Raises:
        UsageError: the model here is another than the leader's; one line.
        PipelineError: the leader is gone; one line.
    """
    import torch.distributed as dist

    own, _ = rank()
    store = meet()
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(store, own, stop), daemon=True)
    beating.start()
    try:
        job = _when_there(store, JOB)
        if job is not None:
            _work(store, own, json.loads(job), model, run, threads)
        store.set(f"longrope/left/{own}", "1")
    except dist.DistError as error:
        raise PipelineError(f"rank {own}: got no more answers from rank 0, expected it to run") from error
    finally:
        stop.set()
        beating.join()


def _work(
    store: Any,
    own: int,
    job: dict[str, Any],
    model: str,
    run: Callable[[models.LoadedModel, Forward], dict[str, Any]],
    threads: int | None,
) -> None:
    found = models.fingerprint(models.find(model))
    if found != job["model_fingerprint"]:
        refuse("MODEL", f"{model} with fingerprint {found} on rank {own}", f"{job['model_fingerprint']}, as on rank 0")
    loaded = models.load(model, job["dtype"], job["original_length"], threads)
    windows: dict[str, tuple[int, ...]] = {}
    number = 0
    while not store.check([DONE]):
        if number >= store.add(COUNT, 0):
            time.sleep(POLL_SECONDS)
            continue
        name = f"longrope/task/{number}"
        if store.check([name]) and claim(store, number, own):  # gone where it is done: a rank may start late
            task = json.loads(store.get(name))
            name = task["window"]
            if name not in windows:
                windows[name] = tuple(json.loads(store.get(f"longrope/window/{name}")))
            window = data.Window("", "", 0, 0, windows[name])
            rope = lk.LongRope.from_dict(task["rope"])
            record = run(loaded, Forward(window, rope, task["length"], task["start"]))
            store.set(f"longrope/result/{number}", json.dumps({**record, **task["fields"], "rank": own}))
        number += 1


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


def _when_there(store: Any, name: str) -> bytes | None:
    """Return a value once it is there, or None where the job ended before."""
    while not store.check([name]):
        if store.check([DONE]):
            return None
        time.sleep(POLL_SECONDS)
    return bytes(store.get(name))
