"""Peaks of memory, measured on the meta device: the model's own operations run, and nothing is computed or allocated.

Every storage that an operation makes is counted until nobody refers to it, so that what autograd keeps, what layers
recompute and what adapters copy is the code's own and not a formula's. Two things have no meta version and are
replaced by something of the same size: attention, which on the meta device would be the variant that holds all
probabilities, and on CUDA the product of the output layer.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from typing_extensions import override

from dllm_rl import registry
from dllm_rl.diffusion.decoding import propose
from dllm_rl.diffusion.likelihood import token_logp
from dllm_rl.learner.master_weights import MasterWeights
from dllm_rl.models.cache import BlockCache
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.unembedding import _Product
from dllm_rl.types import Sampling

_ATTENTION = "dry_run"
META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Bytes beside the weights.

    Attributes:
        total: the most at any time.
        kept: what the backward pass holds on to once the layers have run; 0 without gradient.
        gradients: what is left at the end.
    """

    total: int
    kept: int = 0
    gradients: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Input of a forward.

    Attributes:
        number: of noised copies.
        length: padded tokens of a copy.
        scored: positions that are unembedded, of all copies.
    """

    number: int
    length: int
    scored: int


class Allocations(TorchDispatchMode):
    """Counts bytes of storages that operations make.

    Attributes:
        now: alive.
        most: alive at any time.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        """Count nothing yet.

        Args:
            held: tensors that are there already: views of them come out of operations too.
        """
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in held}

    @override
    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and value.device.type == "meta":
                self._count(value.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # the address of the storage: data_ptr() is 0 for all on this device
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


class _Attention(torch.autograd.Function):
    """The size of fused attention: it keeps queries, keys, values, its output and a number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        width = (*query.transpose(1, 2).shape[:-1], value.shape[-1])
        out = query.new_empty(width).transpose(1, 2)
        ctx.save_for_backward(query, key, value, bias, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    groups = cast(int, getattr(module, "num_key_value_groups", 1))
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    bias = torch.zeros_like(attention_mask, dtype=value.dtype)  # what torch makes of a boolean mask, in every layer
    out = _Attention.apply(query.to(value.dtype), key.to(value.dtype), value, bias)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attend)


class _ProductOnCuda(_Product):
    """Float32 logits without the float32 copies of the operands that a CPU makes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(len(rows), len(weight), dtype=torch.float32)


class DryRun:
    """The passes of a run over a model on the meta device."""

    def __init__(self, denoiser: TransformersDenoiser, *, device: str) -> None:
        """Take over a model.

        Args:
            denoiser: on the meta device, with its adapter; used for nothing else afterwards.
            device: type of the device that is planned for, "cuda" or "cpu".
        """
        self._denoiser, self._cuda = denoiser, device == "cuda"
        denoiser.module.config._attn_implementation = _ATTENTION  # no setter takes a name for the dry run alone

    def update(self, rows: Rows, *, passes: int, sums: bool = True) -> Peak:
        """Of forward and backward of a micro-batch.

        Args:
            rows: of the micro-batch.
            passes: 2 = gradients of another micro-batch are there already.
            sums: keep gradients as the torch learner does; else each is gone once it is there, to where ZeRO sums them.
        """
        module = self._denoiser.module
        parameters = [p for p in module.parameters() if p.requires_grad]
        keeper = MasterWeights(parameters, keep=True) if sums else None
        for parameter in () if sums else parameters:
            parameter.register_post_accumulate_grad_hook(_forget)
        module.train()
        with self._counting() as counts:
            for _ in range(passes):
                hidden = self._hidden(rows)
                kept = counts.now
                self._logp(hidden, rows).sum().backward()
                del hidden
            gradients = counts.now
        del keeper
        for parameter in parameters:
            parameter.grad = None
            parameter._post_accumulate_grad_hooks = None  # of the masters, which are gone
        return Peak(total=counts.most, kept=kept - (gradients if passes > 1 else 0), gradients=gradients)

    def score(self, rows: Rows) -> Peak:
        """Of a forward without gradient, and of the log-probabilities of its scored positions."""
        with self._counting() as counts, torch.no_grad():
            self._denoiser.module.eval()
            self._logp(self._hidden(rows), rows)
        return Peak(total=counts.most)

    def decode(self, rows: Rows, sampling: Sampling, *, chunk: int, context: int = 0) -> Peak:
        """Of a forward of a rollout, without keys and values that a cache keeps.

        Args:
            rows: in the batch; scored are those that a token is proposed for.
            sampling: temperature and filters.
            chunk: positions that are unembedded at once.
            context: committed tokens of a row in a cache; 0 = the whole row is computed.
        """
        self._denoiser.module.eval()
        with torch.no_grad():
            cache, held = self._cache(rows.number, context) if context else (None, [])
            with self._counting(held) as counts:
                hidden = self._hidden(rows, cache)
                size = max(1, min(rows.scored, chunk))
                # The second chunk is unembedded while the first one's proposals are still there.
                for _ in range(min(2, -(-rows.scored // size))):
                    proposals = self._propose(hidden, size, sampling)
                del proposals
        return Peak(total=counts.most)

    @contextmanager
    def _counting(self, held: Sequence[Tensor] = ()) -> Iterator[Allocations]:
        module = self._denoiser.module
        counts = Allocations((*module.parameters(), *module.buffers(), *held))
        with counts:
            yield counts

    def _cache(self, number: int, context: int) -> tuple[BlockCache, list[Tensor]]:
        """A cache that holds a context, and its tensors."""
        config = self._denoiser.module.config
        heads = (number, config.num_key_value_heads, context, head_width(config))
        window = torch.empty(heads, dtype=self._denoiser.module.get_input_embeddings().weight.dtype, device=META)
        cache = BlockCache(config.num_hidden_layers, torch.empty(number, 0, dtype=torch.bool, device=META))
        held = [part for layer in range(config.num_hidden_layers) for part in cache.update(window, window, layer)]
        cache.commit(torch.empty(number, context, dtype=torch.bool, device=META))
        return cache, held

    def _hidden(self, rows: Rows, cache: BlockCache | None = None) -> Tensor:
        """As Denoiser.hidden_states, or extend with a cache, but for checks of values."""
        blocks, length = self._denoiser.block_size is not None and cache is None, rows.length
        width = 2 * length if blocks else length
        sees = (width, width) if blocks else (1, width + (0 if cache is None else len(cache)))
        family = self._denoiser.family
        # A network that looks at values, such as one that routes tokens to experts, cannot run here.
        with registry.plugin_boundary("families", family.name, "a dry run", family.module_class.__module__):
            hidden: Tensor = self._denoiser.module.base_model(
                input_ids=torch.empty(rows.number, width, dtype=torch.int64, device=META),
                position_ids=torch.empty(1, width, dtype=torch.int64, device=META),
                attention_mask=torch.empty(rows.number, 1, *sees, dtype=torch.bool, device=META),
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        if self._denoiser.shift:
            hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        return hidden[:, length:] if blocks else hidden

    def _logp(self, hidden: Tensor, rows: Rows) -> Tensor:
        place = torch.empty(2, rows.scored, dtype=torch.int64, device=META)
        states, ids = hidden[place[0], place[1]], place[0]
        vocabulary, mask = self._denoiser.vocab_size, self._denoiser.mask_id
        return token_logp(self._unembed, states, ids, vocab_size=vocabulary, mask_id=mask)

    def _propose(self, hidden: Tensor, size: int, sampling: Sampling) -> Any:
        place = torch.empty(2, size, dtype=torch.int64, device=META)
        logits = self._unembed(hidden[place[0], place[1]])
        noise = torch.empty(size, dtype=torch.float64, device=META)
        sampling = dataclasses.replace(sampling, cfg_scale=0.0)
        return propose(logits, sampling, noise, mask_id=self._denoiser.mask_id)

    def _unembed(self, rows: Tensor) -> Tensor:
        head = self._denoiser.module.get_output_embeddings()
        if not self._cuda or head.weight.dtype not in (torch.bfloat16, torch.float16):
            logits: Tensor = head(rows)
            return logits
        product: Tensor = _ProductOnCuda.apply(rows, head.weight)
        return product


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def head_width(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
