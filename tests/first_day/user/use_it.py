"""An export without dllm-rl: its weights in transformers' own Llama, its tokenizer by AutoTokenizer."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PretrainedConfig

folder = Path(sys.argv[1])
settings = json.loads((folder / "config.json").read_text())
settings.pop("model_type")  # a name of dllm-rl's; the other keys are Llama's
model, report = LlamaForCausalLM.from_pretrained(
    folder, config=LlamaConfig(**settings, attn_implementation="sdpa"), output_loading_info=True
)
assert not report["missing_keys"] and not report["unexpected_keys"], report
tokenizer = AutoTokenizer.from_pretrained(folder, config=PretrainedConfig())
chat = [{"role": "user", "content": "2+2"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
canvas = 4
tokens = torch.tensor([[*prompt, *[tokenizer.mask_token_id] * canvas]])
everywhere = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
asked = tokens.clone()
for step in range(2):  # two tokens a forward: those that the model is surest of
    with torch.no_grad():
        logits = model(tokens, attention_mask=everywhere).logits[0]
    if step == 0:
        torch.save({"tokens": asked, "logits": logits.clone()}, "seen.pt")
    logits[:, tokenizer.mask_token_id] = float("-inf")
    logp, best = logits.log_softmax(-1).max(-1)
    masked = tokens[0] == tokenizer.mask_token_id
    chosen = logp.masked_fill(~masked, float("-inf")).topk(2).indices
    tokens[0, chosen] = best[chosen]
print(json.dumps(tokens[0, len(prompt) :].tolist()))
