"""Decoding settings in the words of released generators, and the same settings as a `sampling:` section of ours.

Each case is (name, preset, arguments of the released generator, sampling section). `steps` are those of the whole
canvas, `denoising_steps` of SDAR those of a block.
"""

from __future__ import annotations

from typing import Any

CANVAS = 32
SEED = 11  # of the weights and of the noise
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"  # with pad, mask and eos 64 tokens
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
MAX_LENGTH = 128
GAIN = 8  # weights are multiplied by it, so that predictions are peaked
MASK, EOS, EOT = 1, 2, 7
LENGTHS = {"llada": (5, 9), "fast_dllm": (5, 9), "dream": (5, 9), "sdar": (8, 6)}
Case = tuple[str, str, dict[str, Any], dict[str, Any]]


def prompt(row: int, length: int) -> list[int]:
    """Tokens of a prompt."""
    return [3 + (row * 7 + i * 5) % 61 for i in range(length)]


def cases() -> list[Case]:
    """All of them."""
    return [*_llada(), *_dream(), *_sdar(), *_fast_dllm()]


def _llada() -> list[Case]:
    found: list[Case] = []

    def add(name: str, published: dict[str, Any], **ours: Any) -> None:
        published = {"steps": 16, "block_length": CANVAS} | published
        block = {} if published["block_length"] == CANVAS else {"block_size": published["block_length"]}
        found.append((f"llada {name}", "llada", published, {"steps": published["steps"], **block, **ours}))

    for steps in (32, 16, 12, 5):  # 12 and 5 do not divide 32
        add(f"steps {steps}", {"steps": steps})
    for block, steps in ((8, 16), (8, 12), (16, 10), (4, 64)):  # 3 and 5 do not divide 8 and 16; 8 steps for 4 tokens
        add(f"blocks of {block}, steps {steps}", {"block_length": block, "steps": steps})
    add("cfg", {"cfg_scale": 1.5}, cfg_scale=1.5)
    add("cfg, blocks", {"cfg_scale": 0.5, "block_length": 8}, cfg_scale=0.5)
    add("cfg, sampled", {"cfg_scale": 0.7, "temperature": 0.8}, cfg_scale=0.7, temperature=0.8)
    add("sampled, blocks", {"temperature": 0.9, "block_length": 8, "steps": 12}, temperature=0.9)
    add("random", {"remasking": "random", "steps": 12}, strategy={"name": "random"})
    add("no eos", {"logits_eos_inf": True}, suppress_tokens=[EOS])
    add("eos and eot last", {"confidence_eos_eot_inf": True}, defer_tokens=[EOS, EOT])
    return found


def _dream() -> list[Case]:
    found: list[Case] = []
    for steps in (8, 16, 32):
        for top_k in (50, None):
            for alg, strategy in (
                ("maskgit_plus", "low_confidence"),
                ("topk_margin", "margin"),
                ("entropy", "entropy"),
            ):
                for alg_temp in (0.0, 0.4):
                    # With no top_k the published default is asked for in words; 50 is what its configuration gives.
                    published = {"steps": steps, "alg": alg, "alg_temp": alg_temp, "temperature": 0.0}
                    name = f"dream {alg}, steps {steps}, top_k {top_k}, alg_temp {alg_temp}"
                    ours = {"steps": steps, "top_k": top_k, "top_p": None, "temperature": 0.0}
                    ours["strategy"] = {"name": strategy, "temperature": alg_temp}
                    found.append((name, "dream", published | ({} if top_k else {"top_k": None}), ours))
        origin = {"steps": steps, "schedule": "ancestral", "strategy": {"name": "random"}, "top_p": None}
        published = {"steps": steps, "alg": "origin", "temperature": 0.0}
        found.append((f"dream origin, steps {steps}", "dream", published, origin | {"temperature": 0.0}))
    for alg, strategy in (("maskgit_plus", "low_confidence"), ("entropy", "entropy")):
        published = {"steps": 16, "alg": alg, "alg_temp": 0.0, "temperature": 0.7, "top_p": 0.8, "top_k": 6}
        ours = {"steps": 16, "temperature": 0.7, "top_p": 0.8, "top_k": 6, "strategy": {"name": strategy}}
        found.append((f"dream {alg}, sampled, top_p then top_k", "dream", published, ours))
    readme = {"steps": 32, "alg": "entropy", "alg_temp": 0.0, "temperature": 0.2, "top_p": 0.95}
    found.append(("dream README", "dream", readme, {"steps": 32}))
    return found


def _sdar() -> list[Case]:
    found: list[Case] = []
    for per_block in (1, 2, 3, 4):
        for temperature, top_k, top_p in ((1.0, None, None), (0.6, 5, 0.9)):
            common = {"denoising_steps": per_block, "temperature": temperature}
            common |= {"top_k": top_k or 0, "top_p": top_p or 1.0}
            ours = {"steps": per_block * CANVAS // 4, "temperature": temperature, "top_k": top_k, "top_p": top_p}
            for rule, strategy in (
                ("low_confidence_static", {"name": "low_confidence"}),
                ("low_confidence_dynamic", {"threshold": 0.3}),
                ("sequential", {"name": "left_to_right"}),
            ):
                published = common | {"remasking_strategy": rule, "confidence_threshold": 0.3}
                name = f"sdar {rule}, {per_block} steps a block, temperature {temperature}, top_k {top_k}"
                found.append((name, "sdar", published, ours | {"strategy": strategy}))
    return found


def _fast_dllm() -> list[Case]:
    found: list[Case] = []
    for block in (32, 8):
        for threshold in (0.9, 0.5, 0.2):
            published = {"steps": CANVAS, "block_length": block, "threshold": threshold}
            ours = {"block_size": block, "strategy": {"threshold": threshold}}
            found.append((f"fast_dllm threshold {threshold}, blocks of {block}", "fast_dllm", published, ours))
        for factor in (0.5, 1.0, 2.0):
            published = {"steps": CANVAS, "block_length": block, "factor": factor}
            strategy = {"name": "rollouts.strategies.confidence_factor:ConfidenceFactor", "factor": factor}
            ours = {"block_size": block, "strategy": strategy}
            found.append((f"fast_dllm factor {factor}, blocks of {block}", "fast_dllm", published, ours))
    return found
