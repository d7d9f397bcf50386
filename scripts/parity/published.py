"""Decode tiny checkpoints with the released generators, and write down the tokens that they give.

Nothing is fetched: get the files of SOURCES, below, and put them into one folder under the names there.

    python scripts/parity/checkpoints.py CHECKPOINTS        # in the project's environment
    pip install torch==2.13.0 "transformers==4.57.*" einops # in an environment of its own, for the released code
    PYTHONPATH=. python scripts/parity/published.py FOLDER CHECKPOINTS tests/rollouts/golden/published.json

What is replaced in the released code, so that equal settings can give equal tokens:

- Random numbers: the uniforms of (row, forward, position) that our engines use, inverted here in float64.
- The mask token's logit is -1e9: released generators can propose the mask token itself.
- LLaDA's ids of EOS and EoT, which its generate() spells out, are those of the tiny vocabulary.
- SDAR takes no more positions than are masked: where a block has fewer than the step's count, its topk goes on with
  positions that are not, and overwrites tokens of the prompt or of the block. (`low_confidence_*`, 5 of the cases.)
- SDAR's network is transformers' Qwen3 on recomputed contexts: its own modeling file needs flash-attention and a GPU.

A forward after which nothing changed does not count for the noise, since our engines do not run it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import CANVAS, EOS, EOT, LENGTHS, MASK, SEED, cases, prompt
from torch import Tensor

from dllm_rl.seeding import derive, uniform

# Place in the folder -> repository, commit and path. Dream's files are the hub's with one more `alg`.
SOURCES = {
    "llada/generate.py": "ML-GSAI/LLaDA b7e6c3565f194352da44b38dd12b6970597309f3 generate.py",
    "sdar/generate.py": "JetAstra/SDAR c2041a8333333d685f6e15122c84f60f51f85ebd generate.py",
    "fast_dllm/generate.py": "NVlabs/Fast-dLLM 0d6d48d067176204b7983d3cb8ae742e0726ad53 llada/generate.py",
    **{
        f"models/{family}/{file}": f"NVlabs/Fast-dLLM 24cc59e75f20a6384bae8c905965bb090b96388e {family}/model/{file}"
        for family, file in (
            ("llada", "modeling_llada.py"),
            ("llada", "configuration_llada.py"),
            ("dream", "modeling_dream.py"),
            ("dream", "configuration_dream.py"),
            ("dream", "generation_utils.py"),
        )
    },
}
TOKEN, POSITION, ARRIVAL = 1, 2, 3  # roles of the uniforms in our engines
NEVER = -1e9


class Clock:
    """Which forward of a row runs, and the noise of that forward."""

    def __init__(self, key: int) -> None:
        self.key, self.forward, self._before = key, -1, torch.empty(0)

    def tick(self, tokens: Tensor) -> None:
        """Count a forward over these tokens, unless the one before changed nothing."""
        self.forward += not torch.equal(tokens, self._before)
        self._before = tokens.clone()

    def noise(self, position: Tensor, role: int) -> Tensor:
        """float64 uniforms of these positions at this forward."""
        return uniform(self.key, 0 if role == ARRIVAL else self.forward, position, role)


def invert(probability: Tensor, noise: Tensor) -> Tensor:
    """Tokens (M,) that the uniforms (M,) give by inverting distributions (M, V)."""
    running = probability.double().cumsum(-1)
    return (running <= noise[:, None] * running[:, -1:]).sum(-1).clamp(max=probability.shape[-1] - 1)


class Torch:
    """The torch module with some of its functions replaced."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def module_of(path: Path, name: str, constants: Mapping[str, int]) -> Any:
    """A released file as a module, with other numbers for some of its constants."""
    text = path.read_text(encoding="utf-8")
    for old, new in constants.items():
        text = text.replace(old, str(new))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"{name}.py"
        copy.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, copy)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def network(checkpoints: Path, family: str) -> Any:
    """The released network, in float32."""
    if family == "sdar":
        return qwen3(checkpoints / family)
    loaded = importlib.import_module(f"models.{family}.modeling_{family}")
    cls = loaded.LLaDAModelLM if family == "llada" else loaded.DreamModel
    return cls.from_pretrained(checkpoints / family, torch_dtype=torch.float32).eval()


def qwen3(folder: Path) -> Any:
    """SDAR's equations from transformers: attention patterns are given as masks."""
    from safetensors.torch import load_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = json.loads((folder / "config.json").read_text())
    model = Qwen3ForCausalLM(
        Qwen3Config(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")})
    )
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model.float().eval()


class Calls:
    """A network as generate() calls it: ticks the clock, and never proposes the mask token."""

    device = torch.device("cpu")

    def __init__(self, model: Any, clock: Clock) -> None:
        self.model, self.clock, self.known = model, clock, torch.zeros(1, 0, dtype=torch.int64)

    def eval(self) -> None:
        """Nothing: the network is."""

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Logits of a canvas, or of a block if it is to be stored or not."""
        if "store_kv" in options:
            return self._block(tokens, attention_mask, options["position_ids"], store=options["store_kv"])
        self.clock.tick(tokens[:1])  # with guidance the second row is the one behind a masked prompt
        output = self.model(tokens, attention_mask=attention_mask)
        output.logits[..., MASK] = NEVER
        return output

    def _block(self, tokens: Tensor, attention: Tensor | None, position: Tensor, *, store: bool) -> Any:
        """SDAR: a window that sees what was stored; contexts are recomputed instead of cached."""
        assert attention is not None
        context, width = self.known, tokens.shape[1]
        if store:
            self.known = torch.cat([context, tokens], dim=1)
            return None
        self.clock.tick(torch.cat([context, tokens], dim=1))
        self.window = position[0]
        sequence = torch.cat([context, tokens], dim=1)
        block = torch.arange(sequence.shape[1]) // width
        sees = (block[None, :] <= block[:, None])[None, None]
        output = self.model(input_ids=sequence, attention_mask=sees)
        output.logits = output.logits[:, -width:]
        output.logits[..., MASK] = NEVER
        return output


def llada(module: Any, model: Any, tokens: Tensor, clock: Clock, options: dict[str, Any]) -> Tensor:
    """generate() of LLaDA or of Fast-dLLM."""
    position = torch.arange(tokens.shape[1] + CANVAS)

    def noisy(logits: Tensor, temperature: float) -> Tensor:
        if temperature == 0:
            return logits
        token = invert((logits[0].double() / temperature).softmax(-1), clock.noise(position, TOKEN))
        return torch.nn.functional.one_hot(token, logits.shape[-1])[None].double()

    module.add_gumbel_noise = noisy
    module.torch = Torch(rand=lambda *size, device: clock.noise(position, POSITION)[None])
    if options.get("cfg_scale"):  # without a mask of the attention this branch of the released code stops
        options = options | {"attention_mask": torch.ones_like(tokens)}
    out = module.generate(Calls(model, clock), tokens, gen_length=CANVAS, mask_id=MASK, **options)
    return out[0] if isinstance(out, tuple) else out


def dream(module: Any, model: Any, tokens: Tensor, clock: Clock, options: dict[str, Any]) -> Tensor:
    """diffusion_generate() of Dream."""
    state: dict[str, Any] = {"time": 1.0}
    steps, start = options["steps"], tokens.shape[1]
    grid = torch.linspace(1, 1e-3, steps + 1)

    def hook(step: int, x: Tensor, logits: Tensor) -> Tensor:
        clock.tick(x)
        state["step"], state["at"] = step, (x[0] == MASK).nonzero()[:, 0]
        logits[..., MASK] = NEVER
        return logits

    class Categorical:
        def __init__(self, probs: Tensor) -> None:
            self.probs = probs

        def sample(self) -> Tensor:
            """Tokens of the positions that are masked."""
            return invert(self.probs, clock.noise(state["at"], TOKEN))

    def multinomial(probs: Tensor, num_samples: int) -> Tensor:
        noise = clock.noise(torch.arange(probs.shape[1]), POSITION)
        return (probs.double().log() - (-noise.log()).log()).topk(num_samples).indices

    def rand(*size: int, device: Any) -> Tensor:
        """Uniforms that transfer as many positions as have their arrival now, those of highest noise.

        A position's time of arrival is uniform on [0, 1]; that it lies after s given that it lies before t has
        probability 1 - s/t, the published one. Which of the masked positions arrive is uniform.
        """
        at, t, s = state["at"], grid[state["step"]].double(), grid[state["step"] + 1].double()
        whole = torch.arange(start, start + CANVAS)
        arrived = int((clock.noise(whole, ARRIVAL) >= s).sum()) if state["step"] < steps - 1 else CANVAS
        number = arrived - (CANVAS - len(at))
        order = clock.noise(at, POSITION).argsort(descending=True)
        values = torch.full((len(at),), 1.0, dtype=torch.float64)
        values[order[:number]] = float(1 - s / t) / 2
        return values

    module.dists = types.SimpleNamespace(Categorical=Categorical)
    module.torch = Torch(multinomial=multinomial, rand=rand)
    return model.diffusion_generate(
        tokens, max_new_tokens=CANVAS, mask_token_id=MASK, generation_logits_hook_func=hook, **options
    )


def sdar(module: Any, model: Any, tokens: Tensor, clock: Clock, options: dict[str, Any]) -> Tensor:
    """block_diffusion_generate() of SDAR."""
    calls = Calls(model, clock)

    def topk(values: Tensor, number: Any) -> Any:
        return torch.topk(values, min(int(number), int(values.isfinite().sum())) if values.dim() == 1 else number)

    def multinomial(probs: Tensor, num_samples: int) -> Tensor:
        return invert(probs, clock.noise(calls.window, TOKEN))[:, None]

    module.torch = Torch(multinomial=multinomial, topk=topk)
    prompt_ids = {"input_ids": tokens}
    return module.block_diffusion_generate(calls, prompt_ids, MASK, gen_length=CANVAS, block_length=4, **options)


def main() -> None:
    """Decode every case and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("write", type=Path)
    a = parser.parse_args()
    sys.path.insert(0, str(a.sources))
    stub = types.ModuleType("model.modeling_llada")  # Fast-dLLM's file imports it for its demo alone
    stub.LLaDAModelLM = None
    sys.modules |= {"model": types.ModuleType("model"), "model.modeling_llada": stub}
    modules = {
        "llada": module_of(a.sources / "llada/generate.py", "published_llada", {"126081": EOS, "126348": EOT}),
        "fast_dllm": module_of(a.sources / "fast_dllm/generate.py", "published_fast_dllm", {}),
        "sdar": module_of(a.sources / "sdar/generate.py", "published_sdar", {}),
        "dream": importlib.import_module("models.dream.generation_utils"),
    }
    networks = {family: network(a.checkpoints, family) for family in ("llada", "dream", "sdar")}
    networks["fast_dllm"] = networks["llada"]
    decoders = {"llada": llada, "fast_dllm": llada, "dream": dream, "sdar": sdar}
    rows = {}
    for name, family, options, ours in cases():
        rows[name] = {"preset": family, "sampling": ours, "tokens": []}
        for row, length in enumerate(LENGTHS[family]):
            tokens = torch.tensor([prompt(row, length)])
            clock = Clock(derive(SEED, f"p{row}", 0))
            with torch.no_grad():
                out = decoders[family](modules[family], networks[family], tokens, clock, options)
            # SDAR's last block may stick out past the canvas, where ours ends.
            end = (length + CANVAS) // 4 * 4 if family == "sdar" else length + CANVAS
            rows[name]["tokens"].append(out[0, length:end].tolist())
    header = {
        "made_by": "scripts/parity/published.py",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sources": {
            place: {"from": origin, "sha256": hashlib.sha256((a.sources / place).read_bytes()).hexdigest()}
            for place, origin in SOURCES.items()
        },
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in rows.items())
    a.write.write_text(f'{json.dumps(header)[:-1]}, "cases": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
