"""dllm-rl generate: completions in the terminal, and how they were unmasked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dllm_rl.cli.output import write_json
from dllm_rl.driver.generate import Generation, Model, generate, load

MASK, MASKED, NEW, END = "▒", "bright_black", "bold black on green", "bright_black"
FRAME_S = 0.08  # of the animation on a terminal


def run_generate(
    path: str,
    prompts: list[str],
    *,
    load_options: Mapping[str, Any],
    options: Mapping[str, Any],
    show_steps: bool,
    json_path: Path | None,
) -> None:
    """Complete prompts and print them.

    Args:
        path: of the model, see load().
        prompts: texts.
        load_options: further arguments of load().
        options: further arguments of generate().
        show_steps: print every forward: masks as blocks, new tokens highlighted.
        json_path: where completions go, with their token ids and the forward of each.
    """
    model = load(path, **load_options)
    found = generate(model, prompts, **options)
    console = Console(soft_wrap=True, highlight=False)
    for one in found:
        if len(found) > 1 or show_steps:
            console.print(Text(f"{one.prompt} [{one.sample}]" if one.sample else one.prompt, style="bold"))
        if show_steps:
            _play(console, model, one)
        else:
            console.print(Text(one.text))
        speed = one.length / max(one.num_forwards, 1)
        note = f"{one.length} tokens, {one.num_forwards} forwards ({speed:.2f} a forward), {one.finish}"
        console.print(Text(note, style="bright_black"))
    write_json(json_path, {"model": path, "completions": [_plain(one) for one in found]})


def frames(model: Model, one: Generation) -> Iterator[Text]:
    """The canvas after each forward: blocks where it is masked, what the forward has committed highlighted."""
    pieces = [model.tokenizer.decode([token]) for token in one.tokens.tolist()]
    ends, steps = set(model.denoiser.end_ids), one.step.tolist()
    for forward in range(one.num_forwards):
        text = Text(f"{forward + 1:>4} ", style="bright_black", end="\n")
        for piece, token, step in zip(pieces, one.tokens.tolist(), steps, strict=True):
            if step > forward:
                text.append(MASK, style=MASKED)
            elif step == forward:
                text.append(piece, style=NEW)
            else:
                text.append(piece, style=END if token in ends else "default")
        yield text


def _play(console: Console, model: Model, one: Generation) -> None:
    if not console.is_terminal:
        for frame in frames(model, one):
            console.print(frame)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for frame in frames(model, one):
            live.update(frame, refresh=True)
            time.sleep(FRAME_S)  # a forward of a small model is too fast to be seen


def _plain(one: Generation) -> dict[str, Any]:
    return {
        "prompt": one.prompt,
        "sample": one.sample,
        "text": one.text,
        "tokens": one.tokens.tolist(),
        "step": one.step.tolist(),
        "length": one.length,
        "num_forwards": one.num_forwards,
        "finish": one.finish,
    }
