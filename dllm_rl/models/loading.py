"""Load and save denoisers in their family's own layout: config.json, weights, tokenizer, the hub's code files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from dllm_rl.errors import UserError, first_line
from dllm_rl.models.checkpoint import read_weights, weight_files, write_weights
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.families import family_named, family_of
from dllm_rl.models.family import Family, finish
from dllm_rl.models.lora import merged_weights
from dllm_rl.models.tokenizers import answer_end, save_tokenizer
from dllm_rl.types import BlockOrigin

_SHOWN = 4  # names listed in an error message
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]


def load_denoiser(
    path: str | Path,
    *,
    family: str | Family | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    block_size: int | None = None,
    block_origin: BlockOrigin | None = None,
    end_tokens: Sequence[str | int] = (),
    trust_remote_code: bool = False,
) -> tuple[TransformersDenoiser, Any]:
    """A denoiser and its tokenizer from a checkpoint in the family's own layout.

    Weights never run code from the checkpoint. They are copied one tensor at a time into their final place; besides the
    model, only the pages of the weight file being read are mapped.

    Args:
        path: local folder, or hub name "owner/model".
        family: the family, its entry point, or "package.module:Name"; None finds the one that matches config.json.
        dtype: parameter type.
        device: where the parameters live; "meta" reads no weights, for callers who want shapes and token ids.
        revision: branch, tag or commit of a hub model.
        block_size: tokens per block of a block-causal family; None takes config.json's.
        block_origin: where blocks start; None takes config.json's, else the family's.
        end_tokens: further tokens that end a completion, as text or id, beside the tokenizer's EOS token and the
            eos_token_id of config.json and generation_config.json.
        trust_remote_code: run the checkpoint's own tokenizer code, where transformers has no tokenizer for it.
    Returns:
        (denoiser in evaluation mode, tokenizer).
    Raises:
        UserError: folder or file missing or damaged, unknown family, weights missing or left over (named), no mask
            token, end tokens that do not exist.
    """
    folder = checkpoint_folder(path, revision)
    config = _read_config(folder / "config.json")
    named = family_named(family) if isinstance(family, str) else family
    chosen = family_of(config, str(path)) if named is None else named
    tokenizer = _load_tokenizer(folder, chosen, trust_remote_code)
    module = chosen.skeleton(config, dtype)
    if torch.device(device).type != "meta":
        _fill(module, chosen, folder, dtype, device)
        finish(module, device)
    if chosen.block_causal:
        block_size = config.get("block_size") if block_size is None else block_size
        block_origin = block_origin or config.get("block_origin") or chosen.block_origin
        config |= {"block_size": block_size, "block_origin": block_origin}
    special = _special_tokens(config, tokenizer, chosen, module.config.vocab_size, str(path))
    ends = _end_ids(special, config, folder, tokenizer, end_tokens, module.config.vocab_size)
    special["eos_id"] = ends[0]
    extras = (*sorted(folder.glob("*.py")), *folder.glob("generation_config.json"))
    companions = {file.name: file.read_bytes() for file in extras}
    if end_tokens:  # an export tells them to whoever decodes with it
        settings = json.loads(companions.get("generation_config.json", "{}")) | {"eos_token_id": list(ends)}
        companions["generation_config.json"] = json.dumps(settings, indent=2).encode() + b"\n"
    return (
        TransformersDenoiser(
            module,
            chosen,
            config,
            **special,
            end_ids=ends,
            block_size=block_size,
            block_origin=block_origin or chosen.block_origin,
            companions=companions,
            source=str(path),
        ),
        tokenizer,
    )


def save_denoiser(denoiser: TransformersDenoiser, tokenizer: Any, folder: str | Path) -> None:
    """Write a checkpoint in the family's own layout, adapters merged; the live model is not changed.

    Args:
        denoiser: what to save.
        tokenizer: its tokenizer, see save_tokenizer.
        folder: made if missing; a previous checkpoint in it is replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = denoiser.family
    network = denoiser.module
    skipped = {_ends(network)[1]} if network.config.tie_word_embeddings else set()
    write_weights(
        folder,
        ((family.to_original_name(name), value) for name, value in merged_weights(denoiser) if name not in skipped),
    )
    config = dict(denoiser.config)
    dtype_key = "dtype" if "dtype" in config else "torch_dtype"
    config[dtype_key] = str(network.get_input_embeddings().weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)
    for name, content in denoiser.companions.items():
        (folder / name).write_bytes(content)


def checkpoint_folder(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """A local folder, or where a model of the hub has been downloaded to.

    Args:
        path: local folder, or hub name "owner/model".
        revision: branch, tag or commit of a hub model.
        weights: False leaves the weights of a hub model where they are.
    Raises:
        UserError: neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model '{name}': no such folder, and not a hub name like 'owner/model'")
    try:
        files = [*_HUB_FILES, "*.safetensors"] if weights else _HUB_FILES
        found = Path(snapshot_download(name, revision=revision, allow_patterns=files))
        if weights and not any(found.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError) as error:
        raise UserError(
            f"model '{name}' is neither a local folder nor can it be downloaded ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error
    return found


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        folder = file.parent
        adapter = (folder / "adapter_config.json").is_file()
        hint = "it holds an adapter: load its base model, then the adapter" if adapter else "is it a model folder?"
        raise UserError(f"{folder}: no config.json; {hint}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return config


def _load_tokenizer(folder: Path, family: Family, trust_remote_code: bool) -> Any:
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer (tokenizer.json or tokenizer_config.json)")
    try:
        declared = json.loads(settings.read_text()) if settings.is_file() else {}
        substitute = family.tokenizer_substitutes.get(declared.get("tokenizer_class", ""))
        if substitute is None or trust_remote_code:
            # An empty configuration: transformers knows none of these model types and would warn about config.json.
            return AutoTokenizer.from_pretrained(folder, config=PretrainedConfig(), trust_remote_code=trust_remote_code)
        tokenizer = getattr(transformers, substitute).from_pretrained(folder)
        for number, token in declared.get("added_tokens_decoder", {}).items():
            found = tokenizer.convert_tokens_to_ids(token["content"])
            if found != int(number):
                raise UserError(f"{substitute} gives {token['content']} id {found}, tokenizer_config.json {number}")
        return tokenizer
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from error


def _special_tokens(
    config: Mapping[str, Any], tokenizer: Any, family: Family, vocab_size: int, where: str
) -> dict[str, int]:
    mask_id = config.get("mask_token_id")
    if mask_id is None:
        mask_id = tokenizer.mask_token_id
    if mask_id is None:
        mask_id = tokenizer.get_vocab().get(family.mask_token)
    if mask_id is None:
        raise UserError(
            f"{where}: no mask token: config.json has no mask_token_id, the tokenizer no mask token and no "
            f"'{family.mask_token}'; set mask_token_id in config.json"
        )
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        eos_id = config.get("eos_token_id")
        eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
    if eos_id is None:
        raise UserError(f"{where}: no end-of-sequence token in the tokenizer or config.json; set eos_token_id")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.get("pad_token_id")
    ids = {"mask_id": mask_id, "eos_id": eos_id, "pad_id": eos_id if pad_id is None else pad_id}
    for name, value in ids.items():
        if not 0 <= value < vocab_size:
            raise UserError(f"{where}: {name} = {value} is outside the model's vocabulary of {vocab_size}")
    if mask_id == eos_id:
        raise UserError(f"{where}: mask and end-of-sequence token are both {mask_id}; they must differ")
    return ids


def _end_ids(
    special: Mapping[str, int],
    config: Mapping[str, Any],
    folder: Path,
    tokenizer: Any,
    end_tokens: Sequence[str | int],
    vocab_size: int,
) -> tuple[int, ...]:
    """The tokens that end a completion; first the one that the chat template puts after an answer, else EOS."""
    generation = folder / "generation_config.json"
    declared: list[int] = [special["eos_id"]]
    for settings in (_read_config(generation) if generation.is_file() else {}, config):
        found = settings.get("eos_token_id")
        declared += found if isinstance(found, list) else [] if found is None else [found]
    for token in end_tokens:
        number = tokenizer.get_vocab().get(token) if isinstance(token, str) else token
        if number is None or not 0 <= number < vocab_size or number == special["mask_id"]:
            raise UserError(
                f"model.end_tokens: {token!r} is not a token that {folder} can generate; give the text of one token of "
                f"its tokenizer, such as {tokenizer.eos_token!r}, or an id below {vocab_size}"
            )
        declared.append(number)
    after_answer = answer_end(tokenizer)
    first = [after_answer] if after_answer in declared else []
    # Ids of files that cannot be generated do no harm: leave them out.
    possible = [n for n in (*first, *declared) if 0 <= n < vocab_size and n != special["mask_id"]]
    return tuple(dict.fromkeys(possible))


def _fill(
    module: PreTrainedModel, family: Family, folder: Path, dtype: torch.dtype, device: str | torch.device
) -> None:
    """Replace the parameters on the meta device by the checkpoint's."""
    expected = {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}
    tied = module.config.tie_word_embeddings
    missing = dict.fromkeys(expected)
    left_over: list[str] = []
    for file in weight_files(folder):
        for original, tensor in read_weights(file):
            name = family.to_module_name(original)
            if name.endswith("rotary_emb.inv_freq"):
                continue  # a constant that older checkpoints stored
            if name not in expected:
                left_over.append(original)
                continue
            if tensor.shape != expected[name]:
                raise UserError(
                    f"{folder}: weight {original} has shape {tuple(tensor.shape)}, config.json implies "
                    f"{tuple(expected[name])}"
                )
            missing.pop(name, None)
            parent, _, leaf = name.rpartition(".")
            value = tensor.to(device, dtype, copy=True)  # never a view of the file
            setattr(module.get_submodule(parent), leaf, nn.Parameter(value))
    if tied:
        _check_tie(module, folder, missing)
    problems = []
    if missing:
        problems.append(_listed("missing", [family.to_original_name(name) for name in missing]))
    if left_over:
        problems.append(_listed("left-over", left_over))
    if problems:
        raise UserError(f"{folder}: weights do not fit family '{family.name}': {'; '.join(problems)}")


def _check_tie(module: PreTrainedModel, folder: Path, missing: dict[str, Any]) -> None:
    """One matrix under either name is enough; two different ones contradict config.json."""
    embedding, head = _ends(module)
    if embedding in missing and head not in missing:
        module.get_input_embeddings().weight = module.get_output_embeddings().weight
        del missing[embedding]
    elif head in missing:
        del missing[head]
    elif not torch.equal(module.get_output_embeddings().weight, module.get_input_embeddings().weight):
        raise UserError(f"{folder}: config.json ties the embeddings, the weights hold two different matrices")


def _ends(module: PreTrainedModel) -> tuple[str, str]:
    """Names of the two matrices that a config.json may tie."""
    names = {layer: f"{path}.weight" for path, layer in module.named_modules()}
    return names[module.get_input_embeddings()], names[module.get_output_embeddings()]


def _listed(kind: str, names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{more})"
