"""Jobs are done in order on a thread that ends by itself; dropping forgets those that have not begun."""

import threading
import time

from effitrain.stream.worker import Background, Inline


def test_jobs_are_done_in_order_beside_the_caller():
    worker, done = Background(), []
    for number in range(50):
        worker.add(lambda number=number: done.append((number, threading.current_thread())))
    worker.wait()
    assert [number for number, _ in done] == list(range(50))
    assert threading.current_thread() not in {thread for _, thread in done}
    assert not any(thread.is_alive() for _, thread in done)
    worker.add(lambda: done.append("again"))
    worker.wait()
    assert done[-1] == "again"


def test_dropping_waits_for_the_job_at_hand_and_forgets_the_rest():
    worker, done, begun = Background(), [], threading.Event()

    def slow():
        begun.set()
        time.sleep(0.05)
        done.append("slow")

    worker.add(slow)
    worker.add(lambda: done.append("forgotten"))
    begun.wait()
    worker.drop()
    assert done == ["slow"]
    worker.wait()
    assert done == ["slow"]


def test_inline_jobs_are_done_at_once():
    worker, done = Inline(), []
    worker.add(lambda: done.append(threading.current_thread()))
    worker.drop()
    worker.wait()
    assert done == [threading.current_thread()]
