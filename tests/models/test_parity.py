"""Each family against an oracle written from its equations in plain torch, from the files of the checkpoint alone.

The oracle shares no code with transformers or with the adapters. It treats one unpadded row at a time, and computes a
noised block as [clean blocks before it | the block], not in the [clean | noised] layout.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from dllm_rl.diffusion.layout import block_index
from dllm_rl.models.loading import load_denoiser
from dllm_rl.seeding import generator_for

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

# What the oracle calls a weight -> what the published checkpoints call it.
LLADA_NAMES = {
    "embedding": "model.transformer.wte",
    "final_norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}.",
    "norm_1": "attn_norm",
    "norm_2": "ff_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
QWEN_NAMES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


class Oracle:
    """Logits of one row: y = W_out norm(x_K),  x <- x + Attention(norm(x)),  x <- x + W_d(silu(W_g h) * W_u h)."""

    def __init__(self, folder, dtype):
        config = json.loads((folder / "config.json").read_text())
        self.weights = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
        self.dtype = dtype
        if config["model_type"] == "llada":
            self.names = LLADA_NAMES
            self.layers, self.heads, self.kv_heads = config["n_layers"], config["n_heads"], config["n_kv_heads"]
            self.head_size = config["d_model"] // self.heads
            self.tied = config["weight_tying"]
        else:
            self.names = QWEN_NAMES
            self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
            self.kv_heads = config["num_key_value_heads"]
            self.head_size = config.get("head_dim", config["hidden_size"] // self.heads)
            self.tied = config["tie_word_embeddings"]
        self.theta, self.eps = config["rope_theta"], config["rms_norm_eps"]

    def norm(self, x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def rotate(self, x, positions):
        half = self.head_size // 2
        # Angles in float32, as every published implementation has them.
        frequency = 1.0 / (self.theta ** (torch.arange(0, self.head_size, 2, dtype=torch.float32) / self.head_size))
        angle = positions.float()[:, None] * frequency
        cos, sin = angle.cos().to(self.dtype)[:, None], angle.sin().to(self.dtype)[:, None]
        low, high = x[..., :half], x[..., half:]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def linear(self, x, prefix, name):
        y = x @ self.weights[f"{prefix}{self.names[name]}.weight"].T
        bias = self.weights.get(f"{prefix}{self.names[name]}.bias")
        return y if bias is None else y + bias

    def logits(self, tokens, positions, attends):
        """tokens (L,), positions (L,), attends (L, L) bool query by key -> (L, V)."""
        length = len(tokens)
        embedding = self.weights[self.names["embedding"] + ".weight"]
        x = embedding[tokens]
        for layer in range(self.layers):
            prefix = self.names["layer"].format(layer)
            h = self.norm(x, self.weights[f"{prefix}{self.names['norm_1']}.weight"])
            q = self.linear(h, prefix, "q").view(length, self.heads, self.head_size)
            k = self.linear(h, prefix, "k").view(length, self.kv_heads, self.head_size)
            v = self.linear(h, prefix, "v").view(length, self.kv_heads, self.head_size)
            if f"{prefix}{self.names.get('q_norm', '-')}.weight" in self.weights:
                q = self.norm(q, self.weights[f"{prefix}{self.names['q_norm']}.weight"])
                k = self.norm(k, self.weights[f"{prefix}{self.names['k_norm']}.weight"])
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            out = []
            for head in range(self.heads):
                shared = head // (self.heads // self.kv_heads)
                score = q[:, head] @ k[:, shared].T / self.head_size**0.5
                out.append(score.masked_fill(~attends, float("-inf")).softmax(-1) @ v[:, shared])
            x = x + self.linear(torch.cat(out, dim=-1), prefix, "o")
            h = self.norm(x, self.weights[f"{prefix}{self.names['norm_2']}.weight"])
            gate = self.linear(h, prefix, "gate")
            x = x + self.linear(gate * torch.sigmoid(gate) * self.linear(h, prefix, "up"), prefix, "down")
        x = self.norm(x, self.weights[self.names["final_norm"] + ".weight"])
        return x @ (embedding if self.tied else self.weights[self.names["head"] + ".weight"]).T


def ragged(denoiser, lengths, prompt_lengths):
    """Random rows, right-padded; about half of every completion is hidden, its first position always."""
    generator = generator_for(5, *lengths)
    num_rows, longest = len(lengths), max(lengths)
    position = torch.arange(longest)
    valid = position < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, denoiser.vocab_size, (num_rows, longest), generator=generator)
    tokens = torch.where(valid, tokens, denoiser.pad_id)
    completion = valid & (position >= torch.tensor(prompt_lengths)[:, None])
    mask = completion & (torch.rand(num_rows, longest, generator=generator) < 0.5)
    mask |= position == torch.tensor(prompt_lengths)[:, None]
    return tokens, mask, valid


def logits_of(denoiser, *args):
    hidden = denoiser.hidden_states(*args)
    return denoiser.unembed(hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:2], -1).detach()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llada", "dream", "tiny"])
def test_full_attention_families_compute_the_published_equations(saved, family, tied, dtype):
    folder = saved(family, tie_embeddings=tied, dtype=torch.float64)
    denoiser, _ = load_denoiser(folder, dtype=dtype)
    oracle = Oracle(folder, dtype)
    lengths = [11, 7, 1 + 1]
    tokens, mask, valid = ragged(denoiser, lengths, [4, 1, 1])
    ours = logits_of(denoiser, tokens, mask, valid)
    worst = 0.0
    for row, length in enumerate(lengths):
        noised = torch.where(mask, denoiser.mask_id, tokens)[row, :length]
        expected = oracle.logits(noised, torch.arange(length), torch.ones(length, length, dtype=torch.bool))
        if family == "dream":  # the network's output i - 1 predicts token i
            worst = max(worst, float((ours[row, 1:length] - expected[:-1]).abs().max()))
        else:
            worst = max(worst, float((ours[row, :length] - expected).abs().max()))
    assert expected.abs().max() > 1  # a difference would show
    assert worst < TOLERANCE[dtype] * float(expected.abs().max()), worst


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("origin", ["response", "sequence"])
def test_block_causal_family_computes_the_published_equations(saved, origin, tied, dtype):
    folder = saved("sdar", tie_embeddings=tied, dtype=torch.float64, block_size=3)
    denoiser, _ = load_denoiser(folder, dtype=dtype, block_origin=origin)
    oracle = Oracle(folder, dtype)
    lengths, prompts = [13, 8, 7, 3], [4, 2, 6, 1]  # prompts of 4 and 2 do not divide into blocks of 3
    tokens, mask, valid = ragged(denoiser, lengths, prompts)
    blocks = block_index(torch.tensor(prompts), max(lengths), 3, origin)
    ours = logits_of(denoiser, tokens, mask, valid, blocks)
    worst = 0.0
    for row, length in enumerate(lengths):
        for block in blocks[row, :length].unique():
            here = blocks[row, :length] == block
            before = blocks[row, :length] < block
            positions = torch.cat([before.nonzero()[:, 0], here.nonzero()[:, 0]])
            noised = torch.where(mask[row, :length], denoiser.mask_id, tokens[row, :length])
            sequence = torch.cat([tokens[row, :length][before], noised[here]])
            number = blocks[row, positions]
            expected = oracle.logits(sequence, positions, number[None, :] <= number[:, None])[int(before.sum()) :]
            worst = max(worst, float((ours[row, :length][here] - expected).abs().max()))
    assert expected.abs().max() > 1
    assert worst < TOLERANCE[dtype] * float(expected.abs().max()), worst


def test_one_block_over_the_whole_row_is_full_attention(make):
    block, full = make("sdar", block_size=64), make("sdar", block_size=64)
    tokens, mask, valid = ragged(block, [9, 6], [2, 2])
    blocks = torch.zeros_like(tokens)
    everything_seen = block.hidden_states(tokens, mask, valid, blocks)
    full.block_size = None  # the same weights under plain bidirectional attention
    difference = (everything_seen - full.hidden_states(tokens, mask, valid))[valid].abs().max()
    assert difference < 1e-5
