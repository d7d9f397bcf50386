"""What model.path may be: a model folder or hub name, and a run, a checkpoint or an adapter as well."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dllm_rl.config.schema import Config, LoraSection
from dllm_rl.errors import UserError
from dllm_rl.models.from_config import load_model
from dllm_rl.models.loading import save_denoiser
from dllm_rl.models.sources import adapter_settings, is_adapter
from dllm_rl.storage import checkpoint
from dllm_rl.storage.files import explained


def model_folder(path: str | Path) -> str:
    """The folder that a path means: of a run its newest checkpoint's model, of a checkpoint its model, else itself.

    Args:
        path: a run folder, a checkpoint folder, a model folder, an adapter folder, or a hub name.
    Raises:
        UserError: a run without a checkpoint, a damaged checkpoint, or one that holds something else than a model.
    """
    text = os.path.expanduser(os.path.expandvars(path))
    folder = Path(text)
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir():
        if not checkpoint.names(folder / "checkpoints"):
            raise UserError(f"run '{path}' has no checkpoint yet; train it to a checkpoint, or name another model")
        folder = checkpoint.find(folder / "checkpoints", None)
    elif (folder / "manifest.json").is_file() and (folder / "model").is_dir():
        problem = checkpoint.damage(folder)
        if problem is not None:
            raise UserError(f"checkpoint '{path}' is damaged: {problem}; name another one")
    else:
        return text
    if not any((folder / "model" / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"checkpoint '{folder}' holds an unmasking policy and no model; name the model that it decodes")
    return str(folder / "model")


def run_of(model: str | Path) -> Path | None:
    """The run folder of RUN/checkpoints/step-000040/model; None for a model from elsewhere."""
    parents = Path(model).absolute().parents
    return parents[2] if len(parents) > 2 and (parents[2] / "config.yaml").is_file() else None


def with_start_model(config: Config, folder: Path) -> Config:
    """A configuration whose model.path is one that every process can load, and whose model.lora is the adapter's.

    Args:
        config: of the run.
        folder: the run folder; with model.merge_adapter, the sum is kept in its ``initial`` folder.
    Raises:
        UserError: see model_folder; an adapter that does not fit model.lora; nothing to merge.
    """
    m = config.model
    if m.path is None:
        return config
    initial = folder / "initial"
    if m.merge_adapter and initial.is_dir():  # a run that goes on needs nothing of what it was made from
        return _changed(config, path=str(initial), merge_adapter=False)
    path = model_folder(m.path)
    if not is_adapter(path):
        if m.merge_adapter:
            raise UserError(f"model.merge_adapter: '{m.path}' holds no adapter; leave the option out")
        return _changed(config, path=path)
    if m.merge_adapter:
        _merge(config, path, initial)
        return _changed(config, path=str(initial), merge_adapter=False)
    return _changed(config, path=path, lora=_of_adapter(m.lora, path))


def _changed(config: Config, **values: object) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=values)})


def _merge(config: Config, adapter: str, initial: Path) -> None:
    plain = _changed(config, device="cpu", quantize=None, gradient_checkpointing=False)
    denoiser, tokenizer = load_model(plain, adapter)
    hidden = initial.with_name(".initial")  # as model_path() does it
    with explained(f"'{initial}' cannot be written", initial.parent):
        shutil.rmtree(hidden, ignore_errors=True)  # left by a run that was killed here
        save_denoiser(denoiser, tokenizer, hidden)
        hidden.rename(initial)


def _of_adapter(asked: LoraSection | None, path: str) -> LoraSection:
    """The settings of an adapter that is trained on; what the configuration says must not differ."""
    settings = adapter_settings(path)
    if not isinstance(settings.get("r"), int):
        raise UserError(f"adapter '{path}' has no rank 'r' in its adapter_config.json: only plain LoRA is supported")
    found = {"rank": settings.get("r"), "alpha": settings.get("lora_alpha"), "dropout": settings.get("lora_dropout")}
    for name in asked.model_fields_set if asked is not None else ():
        if name in found and getattr(asked, name) != found[name]:
            raise UserError(
                f"model.lora.{name} = {getattr(asked, name)}: the adapter '{path}' has {found[name]} and is trained "
                f"on; leave model.lora out, or set model.merge_adapter: true for a new adapter on top of the sum"
            )
    return LoraSection.model_validate({name: value for name, value in found.items() if value is not None})
