"""The Denoiser on transformers' own modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dllm_rl.diffusion.layout import block_causal, clean_and_noised
from dllm_rl.errors import UserError
from dllm_rl.models.cache import BlockCache
from dllm_rl.models.evaluating import evaluating
from dllm_rl.models.family import Family
from dllm_rl.protocols.denoiser import Cache, CacheType
from dllm_rl.types import BlockOrigin


class TransformersDenoiser:
    """A protocols.Denoiser over a causal language model of transformers, such as LlamaForCausalLM.

    Attention patterns reach the module as boolean 4D masks (True = may attend), which transformers hands to
    scaled_dot_product_attention unaltered. Logits of whole sequences are never built.

    Attributes:
        family: the adapter of the model's family.
        config: config.json in the family's own keys; written back by save_denoiser.
        companions: further files of the checkpoint folder (the hub's own code), name -> content, written back too.
        adapter: the peft model when a LoRA adapter is attached, else None. `module` is the network in both cases.
        adapter_config: adapter_config.json of an adapter that was loaded, written back by save_adapter; else None.
        source: where the weights came from, for messages and adapter files.
        started_from: folder of the adapter that the run goes on with, or empty.
        forwards: of the network so far; a sign of life.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        family: Family,
        config: Mapping[str, Any],
        *,
        mask_id: int,
        eos_id: int,
        pad_id: int,
        end_ids: Sequence[int] = (),
        block_size: int | None = None,
        block_origin: BlockOrigin = "response",
        companions: Mapping[str, bytes] | None = None,
        source: str = "",
    ) -> None:
        """Wrap a module.

        Args:
            module: the causal language model of transformers, weights loaded.
            family: its family.
            config: its config.json.
            mask_id: mask token.
            eos_id: end-of-sequence token.
            pad_id: padding token.
            end_ids: further tokens that end a completion.
            block_size: tokens per block; required by block-causal families, refused by the others.
            block_origin: where blocks start.
            companions: see the class.
            source: see the class.
        """
        if block_size is not None and not family.block_causal:
            raise UserError(
                f"block_size = {block_size}: family '{family.name}' has full attention; leave it out "
                "(the decoding block is sampling.block_size)"
            )
        if family.block_causal and (block_size is None or block_size < 1):
            raise UserError(
                f"block_size = {block_size}: family '{family.name}' is block-causal and needs tokens per block (>= 1), "
                "which neither config.json nor the caller gave; set model.block_size as the model was trained"
            )
        if block_origin not in ("response", "sequence"):
            raise UserError(f"block_origin = {block_origin!r}: must be 'response' or 'sequence'")
        self.module: Any = module
        self.family = family
        self.config = dict(config)
        self.companions = dict(companions or {})
        self.adapter: Any = None
        self.adapter_config: str | None = None
        self.started_from = ""
        self.source = source
        self.forwards = 0
        self.mask_id = mask_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.end_ids = tuple(dict.fromkeys((eos_id, *end_ids)))
        self.vocab_size: int = module.config.vocab_size
        self.max_length: int = self.config[family.max_length_key]
        self.block_size = block_size
        self.block_origin: BlockOrigin = block_origin
        self.shift = family.shift

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    def hidden_states(self, tokens: Tensor, mask: Tensor, valid: Tensor, block_ids: Tensor | None = None) -> Tensor:
        """Final hidden states whose unembedding predicts each position; see protocols.Denoiser."""
        length = tokens.shape[1]
        self._check_length(length)
        noised = torch.where(mask, self.mask_id, tokens)
        if self.block_size is None:
            if block_ids is not None:
                raise UserError(f"family '{self.family.name}' has full attention: block_ids must be None")
            if self.shift and bool(mask[:, 0].any()):
                raise UserError(
                    f"position 0 is hidden, and family '{self.family.name}' predicts position i from i - 1: "
                    "the first token of a row can never be hidden; start prompts with at least one given token"
                )
            hidden = self._run(noised, self._positions(length), valid[:, None, None, :])
            return torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1) if self.shift else hidden
        if block_ids is None:
            raise UserError(f"family '{self.family.name}' is block-causal: block_ids (N, L) are required")
        hidden = self._run(
            torch.cat([tokens, noised], dim=1),
            self._positions(length).repeat(1, 2),
            clean_and_noised(block_ids, valid)[:, None],
        )
        return hidden[:, length:]

    def unembed(self, rows: Tensor) -> Tensor:
        """Logits (M, V) of hidden states (M, D)."""
        logits: Tensor = self.module.get_output_embeddings()(rows)
        return logits

    @torch.no_grad()
    def prefill(self, tokens: Tensor, valid: Tensor, block_ids: Tensor, cache_type: CacheType = BlockCache) -> Cache:
        """Keys and values of clean right-padded prompts (N, P), P >= 0, under block-causal attention."""
        self._require_blocks("prefill")
        length = tokens.shape[1]
        self._check_length(length)
        cache = cache_type(self.module.config.num_hidden_layers, valid[:, :0])
        if length:
            with evaluating(self.module):
                self._run(tokens, self._positions(length), block_causal(block_ids, valid)[:, None], cache)
            cache.commit(valid)
        return cache

    @torch.no_grad()
    def extend(self, cache: Cache, tokens: Tensor, positions: Tensor, valid: Tensor, *, commit: bool) -> Tensor:
        """Hidden states (N, W, D) of one window per row; see protocols.Denoiser."""
        self._require_blocks("extend")
        sees = torch.cat([cache.valid, valid], dim=1)[:, None, None, :]
        with evaluating(self.module):
            hidden = self._run(tokens, positions, sees, cache)
        if commit:
            cache.commit(valid)
        return hidden

    def _run(self, tokens: Tensor, positions: Tensor, attention: Tensor, cache: Cache | None = None) -> Tensor:
        self.forwards += 1
        hidden: Tensor = self.module.base_model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=attention,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden

    def _positions(self, length: int) -> Tensor:
        return torch.arange(length, device=self.device)[None]

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise UserError(
                f"a sequence of {length} tokens, the model takes at most {self.max_length}; "
                "shorten the prompts or sampling.max_new_tokens"
            )

    def _require_blocks(self, what: str) -> None:
        if self.block_size is None:
            raise UserError(f"{what}: family '{self.family.name}' has full attention, an exact cache does not exist")
