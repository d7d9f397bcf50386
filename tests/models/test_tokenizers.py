import json
import shutil

import pytest
from transformers import AutoTokenizer, GenerationConfig

from dllm_rl.models.create import create_denoiser
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.models.tokenizers import byte_bpe_tokenizer, character_tokenizer, save_tokenizer

CHARACTERS = "0123456789 \n.|=+-abcß∂"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_characters_round_trip_exactly_also_after_saving(tmp_path):
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.save_pretrained(tmp_path)
    for candidate in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in (CHARACTERS, "  12 \n\n 3 ", "\n", " ", "", "a b . c\n"):
            ids = candidate.encode(text)
            assert len(ids) == len(text)
            assert candidate.decode(ids) == text
        assert len(candidate) == len(CHARACTERS) + 3
        assert (candidate.pad_token_id, candidate.mask_token_id, candidate.eos_token_id) == (0, 1, 2)
        assert candidate.encode("0") == [3]
        assert candidate.decode([3, 2, 0], skip_special_tokens=True) == "0"
        assert candidate.unk_token_id is None


def test_unknown_characters_show_as_a_shorter_encoding():
    tokenizer = character_tokenizer("01")
    assert len(tokenizer.encode("0z1")) == 2


@pytest.mark.parametrize(("characters", "message"), [("", "empty"), ("abca", "repeated characters 'a'")])
def test_bad_vocabularies_are_refused(characters, message):
    with pytest.raises(ValueError, match=message):
        character_tokenizer(characters)


def test_byte_pairs_are_learned_and_every_string_round_trips(tmp_path):
    corpus = ["the cat sat on the mat. " * 3, "the dog ate the hat.\n"] * 20
    tokenizer = byte_bpe_tokenizer(corpus, 300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for candidate in (tokenizer, loaded):
        assert len(candidate) <= 300
        assert len(candidate.encode(corpus[0])) < len(corpus[0]) / 3  # merges were learned
        for text in ("the cat", " leading and  double  spaces \n\ttab", "日本 ∂ß 🙂", "don't , stop .", ""):
            assert candidate.decode(candidate.encode(text)) == text
        assert (candidate.pad_token_id, candidate.mask_token_id, candidate.eos_token_id) == (0, 1, 2)
        chat = [{"role": "user", "content": "Hi"}]
        rendered = candidate.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert rendered == "<|user|>\nHi\n<|assistant|>\n"


def test_training_a_tokenizer_is_deterministic():
    corpus = ["some words and some more words", "words again"] * 5
    assert byte_bpe_tokenizer(corpus, 280).get_vocab() == byte_bpe_tokenizer(corpus, 280).get_vocab()


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="must be at least 259"):
        byte_bpe_tokenizer(["x"], 258)


def test_dream_tokenizer_files_load_without_running_the_checkpoints_code(tmp_path):
    tokenizer = byte_bpe_tokenizer(["the cat sat on the mat"] * 20, 300)
    denoiser = create_denoiser("dream", tokenizer, hidden_size=16, num_layers=1, num_heads=2, max_length=32, seed=0)
    save_denoiser(denoiser, tokenizer, tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    # The published layout: slow files and a tokenizer class that only the checkpoint's own code defines.
    plain = {token: number - 3 for token, number in model["vocab"].items() if number >= 3}
    (tmp_path / "vocab.json").write_text(json.dumps(plain))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    special = {len(plain): "<|endoftext|>", len(plain) + 1: "<|mask|>"}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(number): {"content": text, "special": True} for number, text in special.items()},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (tmp_path / "tokenization_dream.py").write_text("raise RuntimeError('never run')\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mask_token_id": len(plain) + 1}))
    loaded, read = load_denoiser(tmp_path)
    assert (loaded.mask_id, loaded.eos_id) == (len(plain) + 1, len(plain))
    assert read.decode(read.encode(" the cat\n")) == " the cat\n"
    assert read.encode("<|mask|>") == [loaded.mask_id]

    settings["added_tokens_decoder"]["290"] = settings["added_tokens_decoder"].pop(str(len(plain) + 1))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"gives <\|mask\|> id .*, tokenizer_config.json 290"):
        load_denoiser(tmp_path)


def old_files(folder, corpus=("the cat sat on the mat. " * 3, "Ünïcode 日本\n")):
    """Tokenizer files as transformers 4 wrote them for SDAR: Qwen's class, added tokens by number."""
    model = json.loads(byte_bpe_tokenizer(list(corpus) * 20, 400).backend_tokenizer.to_str())["model"]
    plain = {token: number - 3 for token, number in model["vocab"].items() if number >= 3}
    merges = [" ".join(pair) for pair in model["merges"]]
    special = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False, "<|MASK|>": False}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(len(plain) + place): {"content": text, "special": flag, "normalized": False}
            for place, (text, flag) in enumerate(special.items())
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|MASK|>"],
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|MASK|>",
        "unk_token": None,
    }
    files = {
        "vocab.json": json.dumps(plain, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(settings, indent=4, ensure_ascii=False),
        "special_tokens_map.json": json.dumps({"eos_token": {"content": "<|endoftext|>", "lstrip": False}}),
        "added_tokens.json": json.dumps({text: len(plain) + place for place, text in enumerate(special)}),
        "chat_template.jinja": CHATML,
        "additional_chat_templates/short.jinja": "{{ messages[0].content }}",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(content)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_files_of_a_loaded_tokenizer_stay_as_they_are(tmp_path):
    old_files(tmp_path / "source")
    source = contents(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    made = create_denoiser("tiny", tokenizer, hidden_size=16, num_layers=1, num_heads=2, max_length=32, seed=0)
    save_denoiser(made, tokenizer, tmp_path / "1")
    for number in "1234":
        found = contents(tmp_path / number)
        assert {name: found[name] for name in source} == source
        assert found.keys() - source.keys() == {"config.json", "model.safetensors"}
        denoiser, read = load_denoiser(tmp_path / number)
        assert read.get_vocab() == tokenizer.get_vocab() and read.chat_template == tokenizer.chat_template
        save_denoiser(denoiser, read, tmp_path / number)  # over its own files
        save_denoiser(denoiser, read, tmp_path / str(int(number) + 1))

    shutil.rmtree(tmp_path / "source")  # purged while a run was training: the run keeps what it knows
    save_denoiser(made, tokenizer, tmp_path / "late")
    assert load_denoiser(tmp_path / "late")[1].get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("kind", ["characters", "byte_bpe"])
def test_tokenizers_made_here_have_a_class_that_transformers_4_knows(tmp_path, kind):
    made = character_tokenizer("01a") if kind == "characters" else byte_bpe_tokenizer(["the cat"], 300)
    save_tokenizer(made, tmp_path)
    declared = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert declared["tokenizer_class"] == "PreTrainedTokenizerFast"
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.get_vocab() == made.get_vocab() and read.chat_template == made.chat_template
    assert read.special_tokens_map == made.special_tokens_map


def chat_model(tmp_path):
    """A folder with the tokenizer of an SDAR chat model, whose answers end at <|im_end|>, and its text -> id."""
    old_files(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    made = create_denoiser("tiny", tokenizer, hidden_size=16, num_layers=1, num_heads=2, max_length=32, seed=0)
    save_denoiser(made, tokenizer, tmp_path / "model")
    return tmp_path / "model", tokenizer.convert_tokens_to_ids


def test_end_tokens_are_those_of_all_files_and_the_template_says_which_one_answers_get(tmp_path):
    folder, number = chat_model(tmp_path)
    end, eos = number("<|im_end|>"), number("<|endoftext|>")
    denoiser, _ = load_denoiser(folder, device="meta")
    assert (denoiser.eos_id, denoiser.end_ids) == (eos, (eos,))  # nothing says that <|im_end|> ends a completion
    chosen, _ = load_denoiser(folder, device="meta", end_tokens=["<|im_end|>", number("<think>")])
    assert (chosen.eos_id, chosen.end_ids) == (end, (end, eos, number("<think>")))
    whole, tokenizer = load_denoiser(folder, end_tokens=["<|im_end|>"])
    save_denoiser(whole, tokenizer, folder.parent / "export")  # whoever decodes with it stops where the run did
    assert load_denoiser(folder.parent / "export")[0].end_ids == (end, eos)
    assert GenerationConfig.from_pretrained(folder.parent / "export").eos_token_id == [end, eos]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, eos, 10**6], "top_k": 7}))
    chosen, _ = load_denoiser(folder, device="meta", end_tokens=["<think>"])
    assert json.loads(chosen.companions["generation_config.json"])["top_k"] == 7
    denoiser, tokenizer = load_denoiser(folder)
    assert (denoiser.eos_id, denoiser.end_ids) == (end, (end, eos))
    save_denoiser(denoiser, tokenizer, folder.parent / "again")
    assert load_denoiser(folder.parent / "again")[0].end_ids == (end, eos)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [eos, end]}))
    assert load_denoiser(folder, device="meta")[0].end_ids == (end, eos)


@pytest.mark.parametrize("wrong", ["<|no_such|>", "the cat", 10**6, -1, "<|MASK|>"])
def test_end_tokens_that_cannot_be_generated_are_refused(tmp_path, wrong):
    folder, _ = chat_model(tmp_path)
    with pytest.raises(ValueError, match=r"model\.end_tokens: .* is not a token that .* can generate; give the text"):
        load_denoiser(folder, device="meta", end_tokens=[wrong])
