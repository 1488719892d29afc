import asyncio
import os
import signal
import threading

import pytest

from rlcore import event_loop


async def thread_after(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return threading.current_thread().name


def test_runs_in_the_thread_itself_where_no_loop_runs() -> None:
    assert event_loop.run(thread_after(0)) == threading.current_thread().name


def test_runs_below_a_loop_that_runs() -> None:
    async def cell() -> None:
        with event_loop.Runner() as runner:
            tasks = [runner.loop.create_task(thread_after(0.01)) for _ in range(2)]
            done, _ = runner.run(asyncio.wait(tasks))
        assert {task.result() for task in done} == {"event-loop_0"}
        assert asyncio.get_event_loop() is asyncio.get_running_loop()

    asyncio.run(cell())


def test_interrupt_below_a_loop_cancels_what_runs() -> None:
    cancelled = []

    async def endless() -> None:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def cell() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio has put its own there
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            event_loop.run(endless())

    asyncio.run(cell())
    assert cancelled
