"""Signals that end a run: after the step under way, with a checkpoint, within a grace period."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlcore.errors import WorkerDied
from rlcore_recipes.checkpoint import CheckpointManager
from rlcore_recipes.ranks import all_gather, is_main
from rlcore_recipes.settings import TrainerSettings

TERMINATE = (signal.SIGTERM, signal.SIGHUP)
"""Signals that come from outside: of a scheduler that takes the machine away, of a terminal that is closed."""


@contextmanager
def stop_signals(grace_s: float, checkpoints: CheckpointManager) -> Iterator[list[int]]:
    """Collect SIGTERM, SIGHUP and SIGINT instead of dying of them; a second SIGINT interrupts immediately.

    A process that is still here ``grace_s`` seconds after SIGTERM or SIGHUP ends, and says from where the run can go
    on. SIGHUP stays ignored where it is (``nohup``).
    """
    received: list[int] = []
    announce = is_main()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        if announce:
            how = f"within {grace_s:g} s" if number in TERMINATE else "Ctrl-C again: immediately"
            print(f"stopping after this step ({how})", file=sys.stderr)

    try:
        before = {
            number: signal.signal(number, note)
            for number in (*TERMINATE, signal.SIGINT)
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
    except ValueError:  # not in the main thread: its caller handles signals
        yield received
        return
    try:
        with grace_period(grace_s, checkpoints if announce else None):
            yield received
    except WorkerDied as error:  # as a rule of the same event as the signal: machines are being taken away
        if not received:
            raise
        if announce:
            how = f"continue from {checkpoints.newest}" if checkpoints.newest else "there is no checkpoint"
            print(f"ended in the middle of a step: {str(error).partition(chr(10))[0]}; {how}", file=sys.stderr)
        raise SystemExit(128 + min(received)) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def grace_period(seconds: float, announced: CheckpointManager | None) -> Iterator[None]:
    """End the process if the block has not ended so many seconds after a SIGTERM or SIGHUP.

    Args:
        announced: names the checkpoint to continue from; None on processes that say nothing.
    """
    # A signal's number is written here even while the main thread is in a call that runs no Python, such as a
    # collective that hangs.
    numbers, wake = socket.socketpair()
    wake.setblocking(False)
    ended = threading.Event()

    def watch() -> None:
        while (number := numbers.recv(1)) and number[0] not in TERMINATE:
            continue
        if not number or ended.wait(seconds):
            return
        if announced is not None:
            how = f"continue from {announced.newest}" if announced.newest else "there is no checkpoint to continue from"
            after = f"{seconds:g} s after {signal.Signals(number[0]).name} (trainer.grace_s)"
            print(f"gave up in the middle of a step, {after}; {how}", file=sys.stderr, flush=True)
        os._exit(128 + number[0])

    watching = threading.Thread(target=watch, name="grace-period", daemon=True)
    watching.start()
    before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        wake.close()
        watching.join()
        numbers.close()


def stop_asked_for(received: list[int]) -> int | None:
    """Return the signal that ends the run, on whichever process it was received; SIGINT before others."""
    everywhere = {number for numbers in all_gather(received[:]) for number in numbers}
    return signal.SIGINT if signal.SIGINT in everywhere else max(everywhere, default=None)


def exit_code(number: int, trainer: TrainerSettings, step: int, total_steps: int) -> int:
    """Say how to continue a run that the signal ``number`` ended after ``step``; return the process's exit code.

    It is 0 after SIGTERM, by which schedulers take a machine away, and after SIGHUP if a checkpoint was made; otherwise
    the code that shells give to what a signal ended.
    """
    saves = trainer.save_freq > 0
    if is_main():
        how = (
            "nothing was saved, so it cannot be continued: trainer.save_freq is -1"
            if not saves
            else "run the same command again to continue"
            if trainer.resume != "never"
            else "continue with trainer.resume=auto"
        )
        print(f"stopped after step {step} of {total_steps}; {how}", file=sys.stderr)
    return 0 if saves and number in TERMINATE else 128 + number
