"""Exports: a trained model as a folder that others can load, with the proof that the training is in it."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_rl.config.load import load_config
from dllm_rl.config.schema import Config
from dllm_rl.diffusion.layout import block_index
from dllm_rl.driver.model_card import model_card
from dllm_rl.driver.start_model import model_folder, run_of
from dllm_rl.errors import RunStopped, UserError
from dllm_rl.models.checkpoint import read_weights, weight_files
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.digest import tensor_digests
from dllm_rl.models.family import Family
from dllm_rl.models.loading import checkpoint_folder, load_denoiser, save_denoiser
from dllm_rl.models.lora import load_adapter, reference_weights
from dllm_rl.models.sources import base_of, is_adapter
from dllm_rl.models.tokenizers import save_tokenizer
from dllm_rl.seeding import generator_for

_PROBED = 16  # tokens of the fixed sequence whose logits are compared
# Largest difference of logits, as a share of the largest one: a sum of weights is rounded, too.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written, and the proof.

    Attributes:
        folder: where it is.
        base: the model that training started from.
        kind: "adapter", "merged" or "full".
        changed: tensors that differ from the base's; of an adapter, adapted layers whose update is not zero.
        tensors: all of them.
        effect: largest change of a logit against the base, as a share of the largest logit.
        error: the same of the export against the checkpoint.
        dtype: of the weights.
    """

    folder: Path
    base: str
    kind: str
    changed: int
    tensors: int
    effect: float
    error: float
    dtype: str


def export_model(source: str | Path, out: Path, *, merge: bool = False, command: str = "") -> Exported:
    """Write a model in its family's own layout, or an adapter in peft's, and prove that the training is in it.

    One model is in memory at a time, in the dtype of its files, and one shard of what is written. The folder appears
    under its name once everything holds.

    Args:
        source: a run folder, a checkpoint folder or an adapter folder.
        out: new folder, or an empty one.
        merge: add an adapter to its base.
        command: for the model card: what was typed.
    Raises:
        UserError: nothing to export, nothing to merge, or a folder that is not empty.
        RunStopped: the export changes nothing against the base, or does not compute what the checkpoint does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' is there already and not empty; name another folder")
    found = Path(model_folder(source))
    adapter, run = is_adapter(found), run_of(found)
    config = None if run is None else load_config(run / "config.yaml")
    if merge and not adapter:
        raise UserError(f"--merge: '{source}' holds no adapter but a whole model; leave the option out")
    base = base_of(found) if adapter else _base_of_run(source, run, config)
    temporary = out.absolute().with_name(f".writing-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by an export that was killed
    temporary.mkdir(parents=True)
    try:
        exported = _written(found, base, temporary, config, adapter=adapter, merge=merge)
        _require_proof(exported, source)
        card = model_card(exported.kind, base, run, None if run is None else _step(found), config, command)
        (temporary / "README.md").write_text(card + _proof(exported), encoding="utf-8")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return dataclasses.replace(exported, folder=out)


def _written(found: Path, base: str, folder: Path, config: Config | None, *, adapter: bool, merge: bool) -> Exported:
    below = checkpoint_folder(base, None if config is None else config.model.revision)
    dtype = next(read_weights(weight_files(below if adapter else found)[0]))[1].dtype
    denoiser, tokenizer = _load(below, dtype, config)
    family = denoiser.family
    if adapter:
        load_adapter(denoiser, found)
        with reference_weights(denoiser):
            start = probe_logits(denoiser)
        wanted = probe_logits(denoiser)
        if merge:
            save_denoiser(denoiser, tokenizer, folder)
        else:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(found / name, folder / name)
            save_tokenizer(tokenizer, folder)
        del denoiser  # before the next one is read: two of 8 B parameters may not fit
        model, _ = _load(folder if merge else below, dtype, config)
        if not merge:
            load_adapter(model, folder)
    else:
        start = probe_logits(denoiser)
        del denoiser
        wanted = probe_logits(_load(found, dtype, config)[0])
        shutil.copytree(found, folder, dirs_exist_ok=True)
        model, _ = _load(folder, dtype, config)
    scale = wanted.abs().max().item()
    changed, tensors = (
        _changed_layers(folder) if adapter and not merge else _changed_tensors(below, folder, family, dtype)
    )
    return Exported(
        folder=folder,
        base=base,
        kind="full" if not adapter else "merged" if merge else "adapter",
        changed=changed,
        tensors=tensors,
        effect=(wanted - start).abs().max().item() / scale,
        error=(probe_logits(model) - wanted).abs().max().item() / scale,
        dtype=str(dtype).removeprefix("torch."),
    )


def probe_logits(denoiser: TransformersDenoiser) -> Tensor:
    """(16, V) logits of a fixed sequence, half of it masked; float32, or float64 of a float64 model."""
    length = min(_PROBED, denoiser.max_length)
    generator = generator_for(0, "export probe")
    tokens = torch.randint(denoiser.vocab_size, (1, length), generator=generator).to(denoiser.device)
    masked = (torch.arange(length, device=denoiser.device) % 2 == 1)[None]
    blocks = None
    if denoiser.block_size is not None:
        start = torch.ones(1, dtype=torch.int64)
        blocks = block_index(start, length, denoiser.block_size, denoiser.block_origin).to(denoiser.device)
    with torch.no_grad():
        states = denoiser.hidden_states(tokens, masked, torch.ones_like(masked), blocks)
        return denoiser.unembed(states[0]).cpu()


def _load(folder: Path, dtype: torch.dtype, config: Config | None) -> tuple[TransformersDenoiser, Any]:
    options: dict[str, Any] = {}
    if config is not None:
        names = {"family", "block_size", "block_origin", "end_tokens", "trust_remote_code"}
        options = config.model.model_dump(include=names)
    return load_denoiser(folder, dtype=dtype, **options)


def _step(found: Path) -> int:
    return int(found.absolute().parent.name.removeprefix("step-"))


def _base_of_run(source: str | Path, run: Path | None, config: Config | None) -> str:
    if run is None or config is None:
        raise UserError(f"'{source}' is neither a run, nor a checkpoint in its run folder, nor an adapter folder")
    if config.model.path is None or config.model.merge_adapter:
        return str(run / "initial")
    return model_folder(config.model.path)


def _changed_tensors(base: Path, folder: Path, family: Family, dtype: torch.dtype) -> tuple[int, int]:
    """(tensors of the folder that differ from the base's, all of them); one is in memory at a time."""
    before, after = (_digests(place, family, dtype) for place in (base, folder))
    return sum(before.get(name) != value for name, value in after.items()), len(after)


def _digests(folder: Path, family: Family, dtype: torch.dtype) -> dict[str, int]:
    return tensor_digests(
        (family.to_module_name(name), tensor.to(dtype))
        for file in weight_files(folder)
        for name, tensor in read_weights(file)
    )


def _changed_layers(folder: Path) -> tuple[int, int]:
    """(adapted layers whose update is not zero, all of them) of an adapter."""
    updates = [value for name, value in read_weights(folder / "adapter_model.safetensors") if ".lora_B." in name]
    return sum(bool(value.any()) for value in updates), len(updates)


def _require_proof(exported: Exported, source: str | Path) -> None:
    if not exported.changed:
        raise RunStopped(
            f"the export of '{source}' is its base '{exported.base}': 0 of {exported.tensors} tensors changed; was it "
            f"trained, and are its updates above the precision of {exported.dtype}?"
        )
    limit = TOLERANCE[getattr(torch, exported.dtype)]
    if not exported.error <= limit:  # a NaN is not
        raise RunStopped(
            f"the export of '{source}' computes something else than the checkpoint: a logit is off by "
            f"{exported.error:.1e} of the largest, {limit:.0e} is allowed for {exported.dtype}; nothing was written"
        )


def _proof(exported: Exported) -> str:
    what = "adapted layers" if exported.kind == "adapter" else "tensors"
    return (
        f"\n## Checked\n\n{exported.changed} of {exported.tensors} {what} differ from the base. On a probe, logits "
        f"move by up to {exported.effect:.2e} of the largest one against the base and are within {exported.error:.2e} "
        f"of the checkpoint's ({exported.dtype}).\n"
    )
