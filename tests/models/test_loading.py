import json
import pickle

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dllm_rl import registry
from dllm_rl.models import checkpoint
from dllm_rl.models.loading import load_denoiser, save_denoiser

ALL = registry.names("families")

# The names of the published checkpoints, one layer.
PUBLISHED_NAMES = {
    "llada": {
        "model.transformer.wte.weight",
        "model.transformer.ln_f.weight",
        "model.transformer.ff_out.weight",
        *(f"model.transformer.blocks.0.{name}_norm.weight" for name in ("attn", "ff")),
        *(f"model.transformer.blocks.0.{name}_proj.weight" for name in ("q", "k", "v", "ff", "up")),
        *(f"model.transformer.blocks.0.{name}_out.weight" for name in ("attn", "ff")),
    },
    "dream": {
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        *("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"),
        *(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"model.layers.0.self_attn.{name}_proj.bias" for name in "qkv"),
        *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    },
}
PUBLISHED_NAMES["sdar"] = {
    *(name for name in PUBLISHED_NAMES["dream"] if not name.endswith("bias")),
    *(f"model.layers.0.self_attn.{name}_norm.weight" for name in "qk"),
}


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize("family", sorted(PUBLISHED_NAMES))
def test_saved_weights_have_the_published_names(saved, family):
    assert set(load_file(saved(family, num_layers=1) / "model.safetensors")) == PUBLISHED_NAMES[family]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ALL)
def test_save_load_save_gives_the_same_bytes(saved, tmp_path, family, tied):
    first = saved(family, tie_embeddings=tied)
    edit_config(first, auto_map={"AutoModel": "modeling_x.X"}, some_extra_key=[1, {"a": None}])
    (first / "modeling_x.py").write_text("raise RuntimeError('weights must never run this')\n")
    (first / "generation_config.json").write_text("{}")
    denoiser, tokenizer = load_denoiser(first)
    save_denoiser(denoiser, tokenizer, tmp_path / "again")
    for name in ("model.safetensors", "modeling_x.py", "generation_config.json"):
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert json.loads((first / "config.json").read_text()) == json.loads((tmp_path / "again/config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "again").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("family", ALL)
def test_special_tokens_and_sizes_are_read(saved, tokenizer, family):
    denoiser, _ = load_denoiser(saved(family))
    assert (denoiser.mask_id, denoiser.eos_id, denoiser.pad_id) == (1, 2, 0)
    assert (denoiser.vocab_size, denoiser.max_length) == (len(tokenizer), 64)
    assert (denoiser.shift, denoiser.block_size) == (family == "dream", 4 if family == "sdar" else None)
    assert not denoiser.module.training


def test_shards_are_written_and_read(saved, make, tokenizer, tmp_path, monkeypatch):
    whole = load_file(saved("llada") / "model.safetensors")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 6000)
    save_denoiser(make("llada"), tokenizer, tmp_path / "shards")
    files = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole) and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    denoiser, _ = load_denoiser(tmp_path / "shards")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10**9)
    save_denoiser(denoiser, tokenizer, tmp_path / "shards")  # the old shards and their index disappear
    assert [file.name for file in (tmp_path / "shards").glob("*model*")] == ["model.safetensors"]
    again = load_file(tmp_path / "shards/model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_bin_weights_are_read(saved):
    folder = saved("llada")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    denoiser, _ = load_denoiser(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")  # the parameters are no view of the file
    embedding = denoiser.module.model.embed_tokens.weight
    assert torch.equal(embedding, weights["model.transformer.wte.weight"])


def test_dtype_is_converted_and_recorded(saved, tokenizer, tmp_path):
    denoiser, _ = load_denoiser(saved("llada"), dtype=torch.bfloat16)
    assert {p.dtype for p in denoiser.module.parameters()} == {torch.bfloat16}
    assert denoiser.module.model.rotary_emb.inv_freq.dtype == torch.float32
    save_denoiser(denoiser, tokenizer, tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_block_options_come_from_the_argument_then_config_and_are_saved(saved, tokenizer, tmp_path):
    folder = saved("sdar", block_origin="response")
    assert load_denoiser(folder)[0].block_origin == "response"
    denoiser, _ = load_denoiser(folder, block_size=8, block_origin="sequence")
    save_denoiser(denoiser, tokenizer, tmp_path / "other")
    again, _ = load_denoiser(tmp_path / "other")
    assert (again.block_size, again.block_origin) == (8, "sequence")


def test_sdar_counts_blocks_from_the_prompt_as_its_published_generator_does(saved, make, tokenizer, tmp_path):
    folder = saved("sdar")
    assert json.loads((folder / "config.json").read_text())["block_origin"] == "sequence"
    edit_config(folder, block_origin="absent")  # the published config.json does not say
    denoiser, _ = load_denoiser(folder)
    assert denoiser.block_origin == make("sdar").block_origin == "sequence"
    save_denoiser(denoiser, tokenizer, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["block_origin"] == "sequence"
    chosen, _ = load_denoiser(folder, block_origin="response")
    assert chosen.block_origin == "response"


def test_tied_weights_under_either_name(saved):
    folder = saved("llada", tie_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.transformer.wte.weight"]
    edit_weights(folder, lambda w: w.update({"model.transformer.ff_out.weight": embedding.clone()}))
    load_denoiser(folder)
    edit_weights(folder, lambda w: w.pop("model.transformer.wte.weight"))
    denoiser, _ = load_denoiser(folder)
    assert denoiser.module.lm_head.weight is denoiser.module.model.embed_tokens.weight
    assert torch.equal(denoiser.module.lm_head.weight, embedding)
    edit_weights(folder, lambda w: w.update({"model.transformer.wte.weight": embedding + 1}))
    with pytest.raises(ValueError, match="two different matrices"):
        load_denoiser(folder)


def damage(file):
    file.write_bytes(file.read_bytes()[:-100])


def unsafe_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(ZeroDivisionError("code")))


def mask_token_gone(folder):
    edit_config(folder, mask_token_id="absent")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "mask_token"}))


BAD_FOLDERS = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no \*.safetensors"),
    "truncated": (lambda f: damage(f / "model.safetensors"), "damaged weight file"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"{}" * 50), "damaged weight file"),
    "code in .bin": (unsafe_pickle, "damaged weight file"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "unknown family": (lambda f: edit_config(f, model_type="gpt2"), "unknown model family, model_type = 'gpt2'.*llada"),
    "no family": (lambda f: edit_config(f, model_type="absent"), "unknown model family, model_type = None"),
    "config key absent": (lambda f: edit_config(f, n_heads="absent"), "lacks n_heads"),
    "unsupported": (lambda f: edit_config(f, block_type="sequential"), "block_type = 'sequential' is not supported"),
    "no mask token": (mask_token_gone, "no mask token"),
    "mask token outside": (lambda f: edit_config(f, mask_token_id=126336), "mask_id = 126336 is outside"),
    "mask is eos": (lambda f: edit_config(f, mask_token_id=2), "must differ"),
    "no tokenizer": (lambda f: [x.unlink() for x in f.glob("tokenizer*")], "no tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer cannot be loaded"),
    "left over": (
        lambda f: edit_weights(f, lambda w: w.update({"model.transformer.blocks.0.q_norm.weight": torch.ones(2)})),
        r"1 left-over \(model.transformer.blocks.0.q_norm.weight\)",
    ),
    "missing": (
        lambda f: edit_weights(f, lambda w: [w.pop(name) for name in sorted(w)[:6]]),
        r"6 missing \(model.transformer.blocks.0.*, \.\.\.\)",
    ),
    "shape": (lambda f: edit_config(f, mlp_hidden_size=41), r"has shape \(\d+, \d+\), config.json implies"),
    "shard gone": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}'),
        "1 of 1 weight files are missing, first x.safetensors",
    ),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "not a weight index"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_checkpoints_are_one_clear_line(saved, case):
    break_it, message = BAD_FOLDERS[case]
    folder = saved("llada")
    break_it(folder)
    with pytest.raises(ValueError, match=message) as raised:
        load_denoiser(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(ValueError, match=f"model '{name}': no such folder"):
        load_denoiser(name)


def test_a_hub_name_that_cannot_be_fetched_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nobody/no-such-model' is neither a local folder nor") as raised:
        load_denoiser("nobody/no-such-model")
    assert "\n" not in str(raised.value)


def test_a_hub_model_is_found_in_the_cache(saved, tmp_path, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "hub/models--owner--model"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    (repository / "refs/other").write_text("1" * 40)
    saved("llada").rename(repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    denoiser, _ = load_denoiser("owner/model")
    assert denoiser.source == "owner/model"
    with pytest.raises(ValueError, match="neither a local folder nor"):
        load_denoiser("owner/model", revision="other")


def test_an_adapter_folder_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        load_denoiser(tmp_path)


def test_mask_token_from_the_tokenizer_when_config_has_none(saved):
    folder = saved("llada")
    edit_config(folder, mask_token_id="absent")
    assert load_denoiser(folder)[0].mask_id == 1


def test_memory_that_runs_out_is_no_damage(tmp_path, monkeypatch):
    """Before: "damaged weight file (unable to mmap ...: Cannot allocate memory); download or copy it again"."""

    def full(*args, **options):
        raise RuntimeError("unable to mmap 33598360 bytes from file <model.safetensors>: Cannot allocate memory (12)")

    monkeypatch.setattr(checkpoint.safetensors, "safe_open", full)
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        list(checkpoint.read_weights(tmp_path / "model.safetensors"))
