"""dllm-rl plan: what a run would hold, compute and cost, in words, before it starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from dllm_rl.cli.output import stdout, write_json
from dllm_rl.config.schema import Config
from dllm_rl.planning.cards import Card, card_of
from dllm_rl.planning.memory import PHASES, Device
from dllm_rl.planning.plan import Change, Plan, plan_run, remedies, seconds_of, speeds_of

_SHOWN = 4  # terms of a phase, and changes that would help


def run_plan(
    config: Config,
    *,
    card: str | None,
    memory_gb: float | None,
    tflops: float | None,
    utilisation: float,
    like: Path | None,
    price: float | None,
    json_path: Path | None,
) -> int:
    """Plan, print, and write if asked.

    Args:
        config: of the run.
        card: name of the devices' kind; None = by the figures, else what is here.
        memory_gb: of a device, 10^9 bytes.
        tflops: of a device.
        utilisation: share of them that a run reaches.
        like: a run whose speed is taken instead.
        price: of a device and hour.
        json_path: file to write.
    Returns:
        the exit code: 1 if a device would be too small.
    Raises:
        UserError: what launch would refuse, or an option that is none.
    """
    chosen = card_of(card, memory_gb, tflops)
    plan, denoiser = plan_run(config, chosen)
    speeds = speeds_of(like) if like is not None else {}
    if not speeds and chosen.flops is not None:
        speeds = dict.fromkeys(("decoding", "scoring", "updating"), utilisation * chosen.flops)
    seconds = seconds_of(plan, speeds) if speeds else {}
    fits = plan.memory.peak <= chosen.usable
    helps = [] if fits else remedies(plan, denoiser, chosen)
    for line in (*_model(plan), *_rows(plan), *_prompt(plan)):
        print(line)
    for device in plan.memory.devices:
        _show(device, chosen)
    if plan.memory.store:
        print(f"           in Ray's object store: weights of a push {_gb(plan.memory.store)} GB")
    for line in (*_verdict(plan, chosen, helps), *_cost(plan, seconds, price, like, utilisation, chosen)):
        print(line)
    write_json(json_path, _values(plan, chosen, seconds, helps))
    return 0 if fits else 1


def _model(plan: Plan) -> Iterator[str]:
    model, states = plan.config.model, plan.memory.states
    held = model.dtype if model.quantize is None else f"{model.quantize}, the rest in {model.dtype}"
    yield f"model      {_millions(plan.parameters)} parameters of family '{plan.family}' in {held}"
    if plan.matches is not None:
        for name, (modules, size) in plan.matches.items():
            yield f"adapter    {name}: {modules} modules, {_millions(size)} parameters"
    yield f"trained    {_millions(states.trained)} parameters ({states.trained / plan.parameters:.2%} of the model)"


def _rows(plan: Plan) -> Iterator[str]:
    batch, learner, work = plan.memory.batch, plan.config.learner, plan.work
    made = f"{_count(batch.prompts, 'prompt')} x {_count(batch.samples, 'sample')} = {_count(batch.rows, 'row')}"
    yield f"rows       {made} of at most {batch.length} tokens"
    if work.decoded:
        call = f"{batch.decoded.number} rows a forward on {_count(plan.config.cluster.engines, 'engine')}"
        yield f"rollout    at most {work.forwards} forwards to decode a row; {call}"
    share = f" of each of {batch.ranks} ranks" if batch.ranks > 1 else ""
    yield (
        f"update     {_count(batch.minibatches, 'minibatch', 'es')} x {_count(batch.passes, 'pass', 'es')} = "
        f"{_count(batch.updates, 'optimiser update')} a step, {_count(work.draws, 'draw')} a likelihood"
    )
    yield (
        f"           {batch.copies} noised copies{share} in {_count(batch.microbatches, 'micro-batch', 'es')} of "
        f"{batch.micro.number}: {batch.micro.number * batch.length:,} tokens a forward "
        f"(learner.tokens_per_microbatch = {learner.tokens_per_microbatch})"
    )
    rows = plan.prompts.rows
    passes = plan.config.run.steps * batch.prompts / rows
    updates = _count(work.steps * work.updates_per_step, "update")
    yield f"run        {_count(work.steps, 'step')} = {updates}, {passes:.2f} epochs of {rows:,} rows"


def _prompt(plan: Plan) -> Iterator[str]:
    prompts, first = plan.prompts, plan.prompts.first
    ids = ", ".join(map(str, first.token_ids[:12])) + (", ..." if len(first.token_ids) > 12 else "")
    looked = "rows" if prompts.looked_at == prompts.rows else f"rows of {prompts.rows:,} that were looked at"
    yield f"prompt     '{first.uid}': {len(first.token_ids)} tokens of at most {prompts.limit}: {ids}"
    yield f"           {json.dumps(first.text, ensure_ascii=False)}"
    yield f"           mean {prompts.mean:.0f}, longest {prompts.longest} tokens in {prompts.looked_at:,} {looked}"


def _show(device: Device, card: Card) -> None:
    times = f" (x {device.count})" if device.count > 1 else ""
    table = Table(title=f"memory of {device.name}{times}, GB", title_justify="left")
    for name in ("phase", "sum", "of it"):
        table.add_column(name, justify="right" if name == "sum" else "left")
    for phase in PHASES:
        terms = device.largest(phase)
        parts = [f"{term.name} {_gb(term.bytes)}" for term in terms[:_SHOWN]]
        rest = sum(term.bytes for term in terms[_SHOWN:])
        table.add_row(phase, _gb(device.of(phase)), ", ".join(parts + ([f"rest {_gb(rest)}"] if rest else [])))
    stdout().print(table)
    if device.host:
        print(f"           in host memory: {', '.join(f'{term.name} {_gb(term.bytes)} GB' for term in device.host)}")


def _verdict(plan: Plan, card: Card, helps: list[tuple[Change, int]]) -> Iterator[str]:
    fullest = max(plan.memory.devices, key=lambda device: device.peak)
    where = f"phase {fullest.worst}" if plan.memory.peak == fullest.peak else "all processes at their peaks"
    need = f"{_gb(plan.memory.peak)} GB in {where}"
    need = f"{need}, {card.name} gives {_gb(card.usable)} of {_gb(card.memory)} GB"
    if plan.memory.peak <= card.usable:
        yield f"fits       {need}"
        return
    yield f"TOO LARGE  {need}"
    for change, peak in helps[:_SHOWN]:
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in change.items())
        yield f"           {text}: {_gb(peak)} GB{'' if peak <= card.usable else ', still too large'}"
    if not any(peak <= card.usable for _, peak in helps):
        yield "           none of these is enough alone; combine them, or plan for a larger --card"


def _cost(
    plan: Plan, seconds: Mapping[str, float], price: float | None, like: Path | None, utilisation: float, card: Card
) -> Iterator[str]:
    work = plan.work
    flop = ", ".join(f"{name} {getattr(work, name):.1e}" for name in ("decoding", "scoring", "updating"))
    yield f"work       {work.flop:.1e} FLOP: {flop}"
    if not seconds:
        yield "time       unknown: give --tflops, a --card, or --like RUN"
        return
    by = f"as {like} ran" if like is not None else f"{utilisation:.0%} of {(card.flops or 0) / 1e12:.0f} TFLOP/s"
    step = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if value)
    hours, devices = step * work.steps / 3600, sum(device.count for device in plan.memory.devices)
    cost = "" if price is None else f", {hours * devices * price:,.2f} at {price:g} an hour"
    yield f"time       {step:.1f} s a step ({parts}), at {by}"
    yield f"           {hours:,.1f} hours on {_count(devices, 'device')} = {hours * devices:,.1f} device hours{cost}"


def _values(plan: Plan, card: Card, seconds: Mapping[str, float], helps: list[tuple[Change, int]]) -> dict[str, Any]:
    states, batch = dataclasses.asdict(plan.memory.states), dataclasses.asdict(plan.memory.batch)
    return {
        "card": dataclasses.asdict(card),
        "parameters": plan.parameters,
        "matches": plan.matches,
        "states": states,
        "batch": batch,
        "devices": [
            {
                "name": device.name,
                "count": device.count,
                "phases": {phase: device.of(phase) for phase in PHASES},
                "terms": [{"name": t.name, "bytes": t.bytes, "phases": sorted(t.phases)} for t in device.terms],
                "host": [{"name": t.name, "bytes": t.bytes} for t in device.host],
            }
            for device in plan.memory.devices
        ],
        "object_store": plan.memory.store,
        "peak": plan.memory.peak,
        "fits": plan.memory.peak <= card.usable,
        "changes": [{"change": dict(change), "peak": peak} for change, peak in helps],
        "work": dataclasses.asdict(plan.work),
        "seconds_per_step": dict(seconds),
        "prompt": {"tokens": len(plan.prompts.first.token_ids), "limit": plan.prompts.limit},
    }


def _gb(size: int) -> str:
    """10^9 bytes, with two figures for what is small."""
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}" if size >= 1e6 else "0"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _count(number: int, name: str, plural: str = "s") -> str:
    return f"{number:,} {name}{'' if number == 1 else plural}"
