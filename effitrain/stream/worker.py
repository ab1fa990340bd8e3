"""Jobs done in order beside the computation, or at once."""

import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class Background:
    """Does jobs in order on a thread that lives while there are any, so nobody has to end it."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, job: Job) -> None:
        """Do ``job`` after those before it; it must not raise."""
        with self._lock:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="effitrain copies")
                self._thread.start()

    def drop(self) -> None:
        """Forget the jobs that have not begun, and wait for the one that has."""
        with self._lock:
            self._jobs.clear()
        self.wait()

    def wait(self) -> None:
        """Until every job is done."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            job()


class Inline:
    """Does every job when it is added: for fake tensors, which do not go together with threads."""

    def add(self, job: Job) -> None:
        """Do ``job`` now."""
        job()

    def drop(self) -> None:
        """There is never one waiting."""

    def wait(self) -> None:
        """Every job is done."""
