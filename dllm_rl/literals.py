"""Closed sets of words that configurations and values share; without torch, so that a typing error is told at once."""

from __future__ import annotations

from typing import Literal

Finish = Literal["eos", "length", "paused"]
BlockOrigin = Literal["response", "sequence"]
Schedule = Literal["static", "uniform", "timesteps", "ancestral"]
Confidence = Literal["model", "sampled"]
