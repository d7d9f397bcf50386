"""The network of a learned unmasking policy: one transformer layer over the confidences of a frozen language model.

    input of position i: c_i, the probability of its proposed token (1 where the token is visible already)
    condition of i:      embedding of "is hidden" + MLP(sinusoids of time), time = forwards taken / canvas tokens
    output:              a utility per position, in nats

Source: Jazbec et al. 2025 (Learning unmasking policies), arXiv:2512.09106: one block, d = 128, 2 heads, rotary
positions, adaptive LayerNorm per position, output bias -2 so that the untrained policy is slow. Deviations: a visible
position has confidence 1 instead of the network's prediction there (its mask bit says the same), so that nothing more
is unembedded than is hidden; a block-causal model's policy sees its active block, the only one that is computed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dllm_rl.errors import UserError
from dllm_rl.seeding import generator_for

FILE = "policy.safetensors"
START_BIAS = -2.0


class UnmaskingPolicy(nn.Module):
    """Utilities of positions; about 0.3 M parameters at the default width."""

    def __init__(self, *, width: int = 128, heads: int = 2, seed: int = 0) -> None:
        """Make an untrained policy.

        Args:
            width: of the layer; a multiple of 2 * heads.
            heads: attention heads.
            seed: of the initial weights.
        """
        super().__init__()
        if width % (2 * heads):
            raise UserError(f"width = {width}: must be a multiple of {2 * heads}, twice the number of heads")
        self.width, self.heads = width, heads
        self.confidence = nn.Linear(1, width)
        self.is_hidden = nn.Embedding(2, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.last_norm = nn.LayerNorm(width)
        self.utility = nn.Linear(width, 1)
        generator = generator_for(seed, "unmasking policy")
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() >= 2:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.bias.zero_()
            self.confidence.weight.copy_(torch.randn(width, 1, generator=generator))
            self.modulation[1].weight.zero_()  # type: ignore[operator]  # adaptive LayerNorm starts as no change
            self.utility.bias.fill_(START_BIAS)

    def forward(self, confidence: Tensor, hidden: Tensor, context: Tensor, time: Tensor) -> Tensor:
        """Utilities of every position.

        Args:
            confidence: (R, W) float32 probability of the proposed token; read where hidden.
            hidden: (R, W) bool.
            context: (R, W) bool; positions that may be attended to, at least one per row.
            time: (R,) float32 in [0, 1].
        Returns:
            (R, W) float32; meaningless outside the context.
        """
        x = self.confidence(torch.where(hidden, confidence, 1.0)[..., None])
        condition = self.is_hidden(hidden.long()) + self.time(self._sinusoids(time))[:, None]
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate_1 * self._attend(self.norm(x) * (1 + scale_1) + shift_1, context)
        x = x + gate_2 * self.mlp(self.norm(x) * (1 + scale_2) + shift_2)
        utility: Tensor = self.utility(self.last_norm(x)).squeeze(-1)
        return utility

    def _attend(self, x: Tensor, context: Tensor) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        angle = self._frequencies(self.width // self.heads, x) * torch.arange(length, device=x.device)[:, None]
        query, key = (_rotate(t, angle) for t in (query, key))
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=context[:, None, None, :])
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, length, -1))
        return out

    def _sinusoids(self, time: Tensor) -> Tensor:
        angle = time[:, None] * self._frequencies(self.width, time) * 1000  # time is in [0, 1]
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    @staticmethod
    def _frequencies(size: int, like: Tensor) -> Tensor:
        return torch.exp(-math.log(10_000) * torch.arange(0, size, 2, device=like.device, dtype=like.dtype) / size)


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def save_policy(policy: UnmaskingPolicy, folder: Path, about: dict[str, Any]) -> None:
    """Write weights and a description into folder/policy.safetensors.

    Args:
        policy: the network.
        folder: made if missing.
        about: what load_policy gives back beside the network; JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"width": policy.width, "heads": policy.heads}
    tensors = {name: value.detach().contiguous().cpu() for name, value in policy.state_dict().items()}
    save_file(tensors, folder / FILE, metadata={"unmasking_policy": json.dumps({"shape": shape, "about": about})})


def load_policy(path: Path) -> tuple[UnmaskingPolicy, dict[str, Any]]:
    """A saved network and its description.

    Args:
        path: the file, or the folder that holds policy.safetensors.
    Raises:
        UserError: no such file, or not a policy.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"'{file}' is not there; give the {FILE} that training an unmasking policy has saved")
    try:
        with safe_open(file, framework="pt") as handle:
            described = json.loads((handle.metadata() or {})["unmasking_policy"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
        policy = UnmaskingPolicy(**described["shape"])
        policy.load_state_dict(tensors)
    except (KeyError, RuntimeError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"'{file}' is not an unmasking policy ({str(error).splitlines()[0]:.80})") from error
    except Exception as error:  # safetensors has no public error type
        raise UserError(f"'{file}' cannot be read ({str(error).splitlines()[0]:.80})") from error
    return policy, described["about"]
