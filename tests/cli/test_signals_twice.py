"""Which signals stop a run at the end of its step, and that the second one does not wait for it."""

from __future__ import annotations

import os
import signal

import pytest

from dllm_rl.cli.signals import SIGNALS, terminated


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_one_asks_and_the_second_ends(number, capfd):
    before = signal.signal(number, signal.SIG_DFL)  # jobs in the background of a shell ignore some
    with pytest.raises(KeyboardInterrupt), terminated() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        os.kill(os.getpid(), number)
    assert signal.signal(number, before) is signal.SIG_DFL
    assert "once more to stop at once" in capfd.readouterr().err


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminated() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)
