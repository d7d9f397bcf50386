"""Tokenizers: small ones that are trained or written here, and the files of any."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dllm_rl.errors import UserError

PAD, MASK, EOS = "<pad>", "<mask>", "<eos>"
SPECIAL = (PAD, MASK, EOS)

# What tokenizers of the hub are stored in, of every release of transformers.
FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character; ids 0, 1, 2 are pad, mask, eos.

    Encoding then decoding gives the text back exactly, newlines and spaces included. There is no unknown token: a
    character outside the vocabulary disappears from the encoding, so `len(ids) != len(text)` detects it.

    Args:
        characters: the vocabulary; duplicates are an error.
    Raises:
        UserError: no characters, or duplicates.
    """
    if not characters:
        raise UserError("character_tokenizer: the vocabulary is empty")
    repeated = sorted({c for c in characters if characters.count(c) > 1})
    if repeated:
        raise UserError(f"character_tokenizer: repeated characters {''.join(repeated)!r}")
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *characters))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))  # no merges: characters; unknown ones drop out
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _finished(tokenizer)


def byte_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding trained on texts; every string can be encoded.

    Args:
        texts: the training corpus.
        vocab_size: tokens including the 256 bytes and 3 special tokens, at least 259.
    Raises:
        UserError: vocab_size below 259.
    """
    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        raise UserError(f"byte_bpe_tokenizer: vocab_size = {vocab_size}, must be at least {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    finished = _finished(tokenizer)
    finished.chat_template = CHAT_TEMPLATE
    return finished


def _finished(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, mask_token=MASK, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer: the files that it was loaded from, byte for byte, so that the hub's own code reads them.

    What transformers 5 would write instead, transformers 4 does not load: a class that it does not know, special tokens
    in another form. A tokenizer without files (made here, or the files are gone) is written so that both load it.

    Args:
        tokenizer: as it was loaded or made; what was changed in a loaded one since (added tokens) is not saved, apart
            from its chat template.
        folder: existing folder.
    """
    source = Path(tokenizer.name_or_path)
    files = {file for pattern in FILES for file in source.glob(pattern)} if tokenizer.name_or_path else set()
    if files:
        for file in files:
            copy = folder / file.relative_to(source)
            if not (copy.exists() and copy.samefile(file)):
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        _save_chat_template(tokenizer, folder)
        return
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    declared = json.loads(settings.read_text())
    if declared.get("tokenizer_class") == "TokenizersBackend":
        declared["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in transformers 4, an alias in 5
        settings.write_text(json.dumps(declared, indent=2, ensure_ascii=False) + "\n")


def _save_chat_template(tokenizer: Any, folder: Path) -> None:
    """Write a template that the copied files do not have, data.chat_template: this file goes before their settings."""
    given, file, settings = tokenizer.chat_template, folder / "chat_template.jinja", folder / "tokenizer_config.json"
    stored = json.loads(settings.read_text()).get("chat_template") if settings.is_file() else None
    if file.is_file():
        stored = file.read_text(encoding="utf-8")
    if isinstance(given, str) and given != stored:
        file.write_text(given, encoding="utf-8")


def answer_end(tokenizer: Any) -> int | None:
    """The token that the chat template puts after an answer; None without a template that renders one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, ValueError):  # it wants other messages, or is several templates without a default
        return None
    ids: list[int] = tokenizer.encode(rendered.rpartition("answer")[2], add_special_tokens=False)
    return ids[0] if ids else None


def vocabulary_digest(tokenizer: Any) -> str:
    """Eight hexadecimal digits that depend on every token and its id: whether two models speak of the same tokens."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.blake2b(repr(entries).encode(), digest_size=4).hexdigest()
