"""Things that happen to a run of train.train() in this process as it draws a certain batch."""
import signal

import train


def at_batch(monkeypatch, index, action):
    """Call action() as the run draws batch `index`, counted from 1.

    With TINY an evaluation draws 4 batches, 2 of each split, and an update 2.
    """
    original, calls = train.draw_batch, []

    def draw(*args):
        calls.append(args)
        if len(calls) == index:
            action()
        return original(*args)
    monkeypatch.setattr(train, 'draw_batch', draw)


def send_signal_at(monkeypatch, index, number=signal.SIGTERM):
    """Make this process send itself a signal as it draws batch `index`."""
    at_batch(monkeypatch, index, lambda: signal.raise_signal(number))
