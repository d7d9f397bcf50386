"""Low-rank adapters through peft, named as in the family's own checkpoints.

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from dllm_rl.errors import UserError, first_line
from dllm_rl.models.checkpoint import read_weights
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.family import Family
from dllm_rl.models.quantize import whole
from dllm_rl.seeding import generator_for

_PREFIX = "base_model.model."  # peft's own, in front of every module name of an adapter file
_SECOND = "reference"
_LORA_PARTS = (".lora_A.", ".lora_B.")
_HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")  # the others, such as "pissa", change the base weights
# Settings with which a layer computes, or a file holds, something else than W + scale * B A.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)


def add_lora(
    denoiser: TransformersDenoiser,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    seed: int,
) -> int:
    """Freeze the network and add a trainable adapter that starts as the identity.

    Args:
        denoiser: changed in place.
        rank: rank r of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input of the update, in training mode.
        targets: linear layers by the family's own names (LLaDA: q_proj, ..., ff_out); None means all of them.
        seed: seed of the initial weights; no global generator is moved.
    Returns:
        Number of modules that got an adapter.
    Raises:
        UserError: a name that matches no module, values out of range, or a denoiser that has an adapter already.
    """
    _require_plain(denoiser)
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise UserError(f"lora: rank = {rank} must be >= 1, alpha = {alpha} > 0 and dropout = {dropout} in [0, 1)")
    table = denoiser.family.lora_targets
    requested = tuple(table) if targets is None else tuple(dict.fromkeys(targets))
    if not requested:
        raise UserError(f"lora.targets is empty; available: {', '.join(table)}")
    modules: list[str] = []
    for name in requested:
        suffix = table.get(name)
        found = [
            path
            for path, module in denoiser.module.named_modules()
            if suffix is not None and path.endswith(f".{suffix}") and isinstance(module, nn.Linear)
        ]
        if not found:
            raise UserError(
                f"lora.targets: '{name}' matches no module of family '{denoiser.family.name}'; "
                f"available: {', '.join(table)}"
            )
        modules += found
    widths = [min(layer.in_features, layer.out_features) for layer in map(denoiser.module.get_submodule, modules)]
    if rank > max(widths):
        raise UserError(
            f"lora.rank = {rank}: the widest target is {max(widths)} wide, and a higher rank is a dearer full update; "
            f"set at most {max(widths)}, or leave model.lora out"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, bias="none")
    _attach(denoiser, config)
    for path, layer in _lora_layers(denoiser.module):
        weight = layer.lora_A["default"].weight
        if weight.is_meta:
            continue
        bound = 1 / math.sqrt(weight.shape[1])  # what nn.Linear draws from
        generator = generator_for(seed, "lora", denoiser.family.to_original_name(path))
        with torch.no_grad():
            weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)
    return len(modules)


def add_second_adapter(denoiser: TransformersDenoiser) -> list[tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """Add another adapter of the same shape, not trained, which reference_weights turns on.

    It starts where the model does: a copy of an adapter that was loaded, else zero.
    It is none of the weights that are trained, sent, saved or merged.

    Returns:
        of each adapted layer: its A and B, and A and B of the adapter that is trained.
    """
    settings = copy.deepcopy(denoiser.adapter.peft_config["default"])
    devices = [denoiser.device] if denoiser.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # see _attach
        denoiser.adapter.add_adapter(_SECOND, settings)
    pairs = []
    for _, layer in _lora_layers(denoiser.module):
        second, trained = ([layer.lora_A[name].weight, layer.lora_B[name].weight] for name in (_SECOND, "default"))
        with torch.no_grad():
            for parameter, start in zip(second, trained, strict=True):
                parameter.requires_grad_(False)
                parameter.copy_(start) if denoiser.adapter_config is not None else parameter.zero_()
        pairs.append((second, trained))
    return pairs


@contextmanager
def reference_weights(denoiser: TransformersDenoiser) -> Iterator[None]:
    """Inside, the denoiser is the frozen network without its adapter, or with the second one if it has that.

    Raises:
        UserError: no adapter, so that there is no second set of weights.
    """
    if denoiser.adapter is None:
        raise UserError("no adapter: a model trained in full needs its own frozen copy as the reference")
    if _SECOND not in denoiser.adapter.peft_config:
        with denoiser.adapter.disable_adapter():
            yield
        return
    denoiser.adapter.set_adapter(_SECOND, inference_mode=True)
    try:
        yield
    finally:
        denoiser.adapter.set_adapter("default")  # trainable again, too


def merged_weights(denoiser: TransformersDenoiser) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain transformers module, weight with the adapter added), one at a time.

    The live model is not changed. Without an adapter these are the parameters themselves.
    """
    layers = dict(_lora_layers(denoiser.module))
    for name, parameter in denoiser.module.named_parameters(remove_duplicate=False):
        if any(part in name for part in _LORA_PARTS):
            continue
        plain = name.replace(".base_layer.", ".")
        path, _, leaf = plain.rpartition(".")
        value = whole(parameter)
        if path in layers and leaf == "weight":
            value = value + layers[path].get_delta_weight("default").detach().to(value.dtype)
        yield plain, value


def merged_updates(denoiser: TransformersDenoiser) -> Iterator[tuple[str, list[nn.Parameter], Callable[[], Tensor]]]:
    """Of each adapted layer: (name in the plain module, parameters that it depends on, its merged weight).

    A model without the adapter that is given these weights computes what this one does.
    """
    for path, layer in _lora_layers(denoiser.module):
        base, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight

        def merged(base: Tensor = base, layer: LoraLayer = layer) -> Tensor:
            return base.detach() + layer.get_delta_weight("default").detach().to(base.dtype)

        yield f"{path}.weight", [base, a, b], merged


def save_adapter(denoiser: TransformersDenoiser, folder: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors in peft's layout, with the family's own module names.

    peft can therefore attach the adapter to the hub's own code too. An adapter that was loaded keeps its settings.
    """
    if denoiser.adapter is None:
        raise UserError("save_adapter: the denoiser has no adapter")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = denoiser.family
    state = {
        _PREFIX + family.to_original_name(name.removeprefix(_PREFIX)): value.detach().cpu().contiguous()
        for name, value in _weights(denoiser).items()
    }
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if denoiser.adapter_config is not None:
        (folder / "adapter_config.json").write_text(denoiser.adapter_config)
        return
    live = denoiser.adapter.peft_config["default"]
    written = LoraConfig(
        **{key: getattr(live, key) for key in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora")}
    )
    paths = {family.to_original_name(path) for path, _ in _lora_layers(denoiser.module)}
    # A pattern over whole paths: the suffix "ff_out" alone would also match LLaDA's output head.
    patterns = {re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(path)) for path in paths}
    written.target_modules = "|".join(sorted(patterns))
    written.base_model_name_or_path = denoiser.source
    written.inference_mode = True
    written.save_pretrained(str(folder))


def load_adapter(denoiser: TransformersDenoiser, folder: str | Path) -> int:
    """Attach an adapter that save_adapter or peft wrote for this family; it is trainable.

    What is adapted is what the file holds weights of, whichever way target_modules says it: LLaDA's suffix "ff_out", of
    released adapters, is the output head too.

    Returns:
        Number of modules that got an adapter.
    Raises:
        UserError: missing or damaged files, an unsupported kind of adapter, or weights that do not fit (named).
    """
    folder, family = Path(folder), denoiser.family
    config, stored = _read(folder)
    state = {_PREFIX + family.to_module_name(name.removeprefix(_PREFIX)): v for name, v in stored.items()}
    paths = {name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in state}
    linear = {path for path, module in denoiser.module.named_modules() if isinstance(module, (nn.Linear, LoraLayer))}
    foreign = sorted(paths - linear)
    if foreign:
        raise UserError(
            f"{folder}: {len(foreign)} adapter modules are not in the model, first {foreign[0]}; {_other(family)}"
        )
    head = next(path for path, m in denoiser.module.named_modules() if m is denoiser.module.get_output_embeddings())
    if head in paths and denoiser.module.config.tie_word_embeddings:
        raise UserError(f"{folder}: an adapter of the output head, which this model shares with its embedding")
    config.target_modules = paths
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None  # the paths say it all
    config.rank_pattern = _by_path(config.rank_pattern, paths, family)
    config.alpha_pattern = _by_path(config.alpha_pattern, paths, family)
    config.init_lora_weights = True
    config.inference_mode = False
    config.base_model_name_or_path = None  # peft warns when the folder was renamed
    if denoiser.adapter is None:
        _attach(denoiser, config)
        denoiser.adapter_config = (folder / "adapter_config.json").read_text()
    live = denoiser.adapter.peft_config["default"]
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if getattr(live, name) != getattr(config, name):
            raise UserError(
                f"{folder}: the adapter has {name} = {getattr(config, name)}, the one in use {getattr(live, name)}"
            )
    wanted = _weights(denoiser)
    misfit = {name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape}
    wrong = sorted(misfit | (wanted.keys() ^ state.keys()))
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} adapter weights do not fit, first {wrong[0]}; {_other(family)}")
    set_peft_model_state_dict(denoiser.adapter, state)
    return len(paths)


def _other(family: Family) -> str:
    return f"is it of another family than '{family.name}', or of a model of another size?"


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Settings and weights of an adapter folder.

    Raises:
        UserError: missing or damaged files, or an adapter that computes something else than W + scale * B A.
    """
    files = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    found = [file for file in files if file.is_file()]
    for needed, present in (
        ("adapter_config.json", (folder / "adapter_config.json").is_file()),
        (files[0].name, found),
    ):
        if not present:
            raise UserError(f"{folder}: no {needed}; is it an adapter folder?")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: damaged or foreign adapter ({first_line(error)})") from error
    unsupported = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if getattr(config, "init_lora_weights", True) not in _HARMLESS_INIT:
        unsupported.append(f"init_lora_weights = {config.init_lora_weights!r} (it changes the weights below)")
    if not isinstance(config, LoraConfig) or unsupported or config.bias != "none":
        raise UserError(
            f"{folder}: only plain LoRA adapters are supported, not {', '.join(unsupported) or 'this kind'}"
        )
    return config, dict(read_weights(found[0]))


def _by_path(pattern: dict[str, int] | None, paths: set[str], family: Family) -> dict[str, int]:
    """A rank_pattern or alpha_pattern by exact path in the module; its keys match ends of the family's own names."""
    chosen = {}
    for path in paths:
        original = family.to_original_name(path)
        key = next((key for key in pattern or () if re.match(rf"(.*\.)?({key})$", original)), None)
        if pattern and key is not None:
            chosen[re.escape(path)] = pattern[key]
    return chosen


def _weights(denoiser: TransformersDenoiser) -> dict[str, Tensor]:
    """The adapter's own weights; peft would add the frozen ones below an adapted output head."""
    found: dict[str, Tensor] = get_peft_model_state_dict(denoiser.adapter, save_embedding_layers=False)
    return found


def _attach(denoiser: TransformersDenoiser, config: LoraConfig) -> None:
    _require_plain(denoiser)
    device = denoiser.device
    training = denoiser.module.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # peft draws its own initial weights from the global generator
        denoiser.adapter = get_peft_model(denoiser.module, config)
    denoiser.module.train(training)


def _require_plain(denoiser: TransformersDenoiser) -> None:
    if denoiser.adapter is not None:
        raise UserError("the denoiser has an adapter already; merge it with save_denoiser and load the result")


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, LoraLayer))
