"""An engine of another package, no torch module, through the whole loop: in this process and on Ray."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm_rl.errors import DigestMismatch, UserError
from dllm_rl.reports.run_folder import comparable
from dllm_rl.train import train

LOCAL = ("cluster.kind=local", "cluster.engines=1")
METHOD = ("algorithm={name: coupled_grpo}", "run.steps=3", "checkpoint.keep=9")


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Makes the package importable, here and in actors, from a plain folder."""
    shutil.copy(Path(__file__).parent / "foreign" / "table_engine.py", tmp_path / "table_engine.py")
    monkeypatch.syspath_prepend(str(tmp_path))

    def named(name="TableEngine", **options):
        more = "".join(f", {key}: {value}" for key, value in options.items())
        return f"engine={{name: 'table_engine:{name}'{more}}}"

    return named


def weights(folder, step):
    return load_file(next(folder.glob(f"checkpoints/step-{step:06d}/model/*.safetensors")))


def same(first, second):
    one, other = weights(first, 3), weights(second, 3)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_trains_in_one_process_and_on_ray_to_the_same_bits(foreign, tiny, ray_cluster, tmp_path):
    diary = tmp_path / "diary"
    folders = [train(tiny(foreign(diary=diary), *METHOD, *place)).folder for place in (LOCAL, ())]
    assert comparable(folders[0]) == comparable(folders[1]) and same(*folders)
    first, last = weights(folders[0], 2), weights(folders[0], 3)
    assert any(not torch.equal(first[name], last[name]) for name in first), "it learned"
    notes = diary.read_text().splitlines()
    local = [note for note in notes if "shared True" in note]
    assert len(local) == 1 and sum("made from" in note for note in notes) == 3, "one here, two in actors"
    assert sum("pushed" in note for note in notes) >= 3 * 4, "at the start and after every step"
    assert sum("closed" in note for note in notes) == 3


def test_other_options_decode_something_else(foreign, tiny):
    plain, sharp = (train(tiny(foreign(sharpness=s), *METHOD, *LOCAL)).folder for s in (1.0, 30.0))
    assert comparable(plain)[0]["reward"] != comparable(sharp)[0]["reward"]


def test_with_lora_it_gets_merged_layers(foreign, tiny):
    config = tiny(foreign(), *METHOD, *LOCAL, "model.lora.rank=4", "model.lora.targets=[q_proj]")
    with pytest.raises(
        UserError, match=r"engine 'table_engine:TableEngine' knows no adapters; set cluster.push: merged"
    ):
        train(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("engine.sharp=2", r"unknown key 'engine.sharp'; nearest is 'engine.sharpness'"),
        ("engine.sharpness=yes", r"engine.sharpness = .*number"),
        ("model={family: sdar, block_size: 4, init: {hidden_size: 32, num_layers: 1, num_heads: 4, max_length: 40}}",
         r"serves full attention, family 'sdar' has block_causal"),
        ("sampling.cfg_scale=0.5", r"does not follow sampling.cfg_scale = 0.5; leave it out"),
        ("sampling.schedule=uniform", r"does not follow sampling.schedule = uniform"),
        ("rollout={correction: token, max_staleness: 1}\nsampling.temperature=0.5",
         r"does not tell how probable a token was under sampling.temperature, .* set temperature: 1.0"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_before_anything_starts(foreign, tiny, change, message):
    with pytest.raises(UserError, match=message):
        train(tiny(foreign(), *METHOD, *LOCAL, *change.splitlines()))


def test_one_that_holds_other_weights_than_it_was_sent_decodes_nothing(foreign, tiny):
    with pytest.raises(DigestMismatch, match=r"engine 0 holds other values than were sent in 1 of \d+ tensors"):
        train(tiny(foreign("LosesBytes"), *METHOD, *LOCAL))
