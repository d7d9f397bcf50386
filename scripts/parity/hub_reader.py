"""Runs in an environment with transformers 4: what the hub's own code makes of a checkpoint folder.

Reads {"folder", "texts", "chats", "rows", "adapter"} as JSON from standard input, writes the answer as JSON to standard
output. The adapter is a folder of one, or {"folder", and the options of a LoraConfig} to make a random one and save it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import peft
import torch
from transformers import AutoModel, AutoTokenizer


def answer(wanted: dict[str, Any]) -> dict[str, Any]:
    """Token ids of texts and conversations and, if there are rows, the logits of the checkpoint's own model code."""
    tokenizer = AutoTokenizer.from_pretrained(wanted["folder"])
    found: dict[str, Any] = {
        "texts": [tokenizer.encode(text, add_special_tokens=False) for text in wanted["texts"]],
        "chats": [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in wanted["chats"]],
        "special": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id],
    }
    if wanted["rows"]:
        model = AutoModel.from_pretrained(wanted["folder"], trust_remote_code=True, dtype=torch.float32).eval()
        if isinstance(wanted["adapter"], str):
            model = peft.PeftModel.from_pretrained(model, wanted["adapter"])
        elif wanted["adapter"] is not None:
            target = wanted["adapter"].pop("folder")
            model = peft.get_peft_model(model, peft.LoraConfig(**wanted["adapter"], init_lora_weights=False))
            model.save_pretrained(target, safe_serialization=False)  # adapter_model.bin
        with torch.no_grad():
            found["logits"] = model(input_ids=torch.tensor(wanted["rows"])).logits.tolist()
    return found


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
