"""The network in the place of the reference policy: model.teacher of the configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dllm_rl.config.schema import Config
from dllm_rl.errors import UserError, first_line
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.from_config import DTYPES
from dllm_rl.models.loading import checkpoint_folder, load_denoiser
from dllm_rl.models.unembedding import Float32Logits


class AutoregressiveTeacher:
    """A causal language model of transformers, scored as a denoiser is: masks are not seen, the tokens before are.

    Attributes:
        module: the network, frozen.
        mask_id: of the model that is taught; never a token of a completion.
        vocab_size: number of logits.
        autoregressive: a token has one log-probability, whatever is masked.
    """

    autoregressive = True

    def __init__(self, module: PreTrainedModel, mask_id: int) -> None:
        self.module: Any = module
        self.mask_id = mask_id
        self.vocab_size: int = module.config.vocab_size
        head = module.get_output_embeddings()
        with torch.device("meta"):
            output = Float32Logits(head.in_features, head.out_features, head.bias is not None)
        output.weight, output.bias = head.weight, head.bias
        module.set_output_embeddings(output)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    def hidden_states(self, tokens: Tensor, mask: Tensor, valid: Tensor, block_ids: Tensor | None = None) -> Tensor:
        """(N, L, D) whose unembedding predicts each position from the tokens before it; position 0 has none."""
        hidden: Tensor = self.module.base_model(
            input_ids=tokens, attention_mask=valid.long(), use_cache=False
        ).last_hidden_state
        return torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)

    def unembed(self, rows: Tensor) -> Tensor:
        """Logits (M, V) of hidden states (M, D), float32 or float64."""
        logits: Tensor = self.module.get_output_embeddings()(rows)
        return logits


Teacher = TransformersDenoiser | AutoregressiveTeacher


def load_teacher(
    config: Config, model: TransformersDenoiser, tokenizer: Any, *, weights: bool = True
) -> Teacher | None:
    """The teacher of a run, frozen and in evaluation mode; None if it has none.

    Args:
        config: of the run.
        model: that is taught; the teacher gets its dtype and its device.
        tokenizer: of the model.
        weights: False reads no weights of a denoiser: a driver that wants to know whether the two fit.
    Raises:
        UserError: no checkpoint, another vocabulary, or other blocks.
    """
    t = config.model.teacher
    if t is None:
        return None
    if t.autoregressive:
        return _autoregressive(config, model, tokenizer) if weights else None
    try:
        teacher, own = load_denoiser(
            t.path,
            family=t.family,
            dtype=DTYPES[config.model.dtype],
            device=model.device if weights else "meta",
            revision=t.revision,
            block_size=config.model.block_size,
            block_origin=config.model.block_origin,
            trust_remote_code=config.model.trust_remote_code,
        )
    except UserError as error:
        raise UserError(f"model.teacher (a causal language model needs autoregressive: true): {error}") from error
    _require_tokens(t.path, own.get_vocab(), tokenizer.get_vocab(), whole=True)
    for what in ("block_size", "block_origin", "mask_id"):
        theirs, ours = getattr(teacher, what), getattr(model, what)
        if theirs != ours:
            raise UserError(
                f"model.teacher.path = {t.path}: its {what} is {theirs}, the model's {ours}; both score the "
                f"same states, so name a teacher of the model's kind"
            )
    teacher.module.requires_grad_(False).eval()
    return teacher


def _autoregressive(config: Config, model: TransformersDenoiser, tokenizer: Any) -> AutoregressiveTeacher:
    t = config.model.teacher
    assert t is not None, "the caller looked"
    folder = checkpoint_folder(t.path, t.revision)
    try:
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
        _require_tokens(t.path, own, tokenizer.get_vocab(), whole=False)
        module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[config.model.dtype], trust_remote_code=False
        ).to(model.device)
    except (OSError, ValueError, KeyError) as error:
        raise (
            error
            if isinstance(error, UserError)
            else UserError(
                f"model.teacher.path = {t.path}: transformers has no causal language model for it ({first_line(error)})"
            )
        ) from error
    if module.config.vocab_size <= max(model.mask_id, *tokenizer.get_vocab().values()):
        raise UserError(
            f"model.teacher.path = {t.path}: it has {module.config.vocab_size} logits, too few for the model's tokens; "
            f"name the model that this one was made from, or another over its vocabulary"
        )
    module.requires_grad_(False).eval()
    return AutoregressiveTeacher(module, model.mask_id)


def _require_tokens(path: str, theirs: dict[str, int], ours: dict[str, int], *, whole: bool) -> None:
    """Refuse another vocabulary. The model's may have more tokens than an autoregressive one: masks, say."""
    odd = sorted(text for text, number in theirs.items() if ours.get(text) != number)
    odd += sorted(text for text in ours if whole and text not in theirs)
    if odd:
        raise UserError(
            f"model.teacher.path = {path}: {len(odd)} tokens are others than the model's ({odd[0]!r}, say); a teacher "
            f"scores the model's own tokens, so name one over the same vocabulary"
        )
