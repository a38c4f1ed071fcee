"""The one thread that all engines of a process compute in, by turns.

OpenMP keeps a team of threads for every thread that computes in parallel. Two teams on the cores of one make each
other wait at every operation: steps become ten times slower. So engines share a thread, and with it a team.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Protocol


class Job(Protocol):
    """What the thread works on."""

    def ready(self) -> bool:
        """Whether there is something to do."""
        ...

    def turn(self) -> bool:
        """Do some of it, for some milliseconds. False when the job is over and was cleaned up after."""
        ...


class Worker:
    """Runs jobs in turns, in a thread that is there while there are jobs."""

    def __init__(self) -> None:
        self.wake = threading.Event()
        """Set when a job has got something to do; one that is at work then ends its turn early."""
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._running = False

    def add(self, job: Job) -> None:
        """Run a job until its turn says that it is over."""
        with self._lock:
            self._jobs.append(job)
            self.wake.set()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="plait-engines", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.wake.clear()
            ready = [job for job in tuple(self._jobs) if job.ready()]
            over = [job for job in ready if not _turn(job)]
            with self._lock:
                self._jobs = [job for job in self._jobs if job not in over]
                if not self._jobs:
                    self._running = False
                    return
            if not ready:
                self.wake.wait()

    def after_fork(self) -> None:
        """In a process that was forked off: the thread is not there, and its jobs are the parent's."""
        self.wake = threading.Event()
        self._start()


def _turn(job: Job) -> bool:
    try:
        return job.turn()
    except Exception:
        # A job answers for its own failures. This one did not, and must not take the others with it.
        logging.getLogger("plait").exception("an engine failed in a way that it does not know of, and is given up")
        return False


WORKER = Worker()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WORKER.after_fork)
