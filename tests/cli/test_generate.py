"""dllm-rl generate and dllm_rl.generate: completions, and the frames of their unmasking."""

from __future__ import annotations

import json

import pytest
import torch

from dllm_rl.cli.generate import MASK, frames
from dllm_rl.cli.main import main
from dllm_rl.driver.generate import generate, load
from dllm_rl.errors import UserError

BOARD = "2.1..4.1.2..1.4.="  # as the task writes it


def test_a_run_completes_prompts_as_it_decoded_and_says_how(finished_run, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main(["generate", str(finished_run), BOARD, "--json", str(path)]) == 0
    (one,) = json.loads(path.read_text())["completions"]
    assert capsys.readouterr().out.splitlines()[0] == one["text"]
    assert one["prompt"] == BOARD and len(one["tokens"]) == 16  # sampling.max_new_tokens of the run
    by_forward = [one["step"].count(forward) for forward in range(one["num_forwards"])]
    assert by_forward == [4] * len(by_forward)  # sampling.tokens_per_step of the run


def test_options_reach_the_sampler(finished_run):
    model = load(finished_run)
    assert [g.num_forwards for g in generate(model, BOARD, steps=2)] == [2]
    slow = generate(model, BOARD, tokens_per_step=1, strategy="left_to_right")[0]
    assert slow.step[: slow.num_forwards].tolist() == list(range(slow.num_forwards))
    assert len(generate(model, BOARD, max_new_tokens=8)[0].tokens) == 8


def test_samples_are_a_function_of_the_seed_and_not_of_other_prompts(finished_run):
    model = load(finished_run)

    def drawn(prompts, seed):
        found = generate(model, prompts, temperature=1.0, samples_per_prompt=3, seed=seed)
        return [g.tokens.tolist() for g in found]

    first = drawn(BOARD, 1)
    assert drawn([BOARD, BOARD[::-1]], 1)[:3] == first != drawn(BOARD, 2)
    assert len({tuple(tokens) for tokens in first}) > 1


def test_every_frame_shows_what_is_masked_and_what_is_new(finished_run, capsys):
    model = load(finished_run)
    (one,) = generate(model, BOARD)
    shown = list(frames(model, one))
    assert len(shown) == one.num_forwards
    for forward, frame in enumerate(shown):
        assert frame.plain.count(MASK) == int((one.step > forward).sum())
        new = "".join(frame.plain[s.start : s.end] for s in frame.spans if "green" in str(s.style))
        committed = one.tokens[one.step == forward].tolist()
        assert new == "".join(model.tokenizer.decode([token]) for token in committed)
    assert main(["generate", str(finished_run), BOARD, "--show-steps"]) == 0
    printed = capsys.readouterr().out
    assert all(frame.plain in printed for frame in shown)


def test_a_prompt_can_be_a_conversation(tiny_denoiser):
    from dllm_rl.driver.generate import Model
    from dllm_rl.models.create import create_denoiser
    from dllm_rl.models.tokenizers import byte_bpe_tokenizer

    tokenizer = byte_bpe_tokenizer(["hello"], 300)
    size = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 96}
    model = Model(denoiser=create_denoiser("tiny", tokenizer, seed=0, **size), tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "tokens_per_step": 4}
    plain, chat, listed = (
        generate(model, prompts, chat=how, **options)[0]
        for prompts, how in (("hi", False), ("hi", True), ([[{"role": "user", "content": "hi"}]], False))
    )
    assert plain.prompt == "hi" and chat.prompt == listed.prompt != "hi" and "hi" in chat.prompt
    assert torch.equal(chat.tokens, listed.tokens)


def test_what_cannot_be_generated_is_refused(finished_run, refuse, tmp_path):
    run = str(finished_run)
    refuse(["generate", str(tmp_path / "none"), "1"], ["no such folder"])
    refuse(["generate", run, "1", "--strategy", "low_confidense"], ["nearest is 'low_confidence'"])
    refuse(["generate", run, "1", "--max-new-tokens", "40"], ["leaves no room for a prompt"])
    refuse(["generate", run, BOARD * 3], ["tokens, 24 are allowed"])
    refuse(["generate", run, "abc"], ["cannot represent"])
    refuse(["generate", run, "1", "--dtype", "float8"], ["one of auto, float32"])
    refuse(["generate", run, "1", "--temperature", "-1"], ["temperature = -1.0"])
    with pytest.raises(UserError, match="both say how many"):
        generate(load(finished_run), BOARD, steps=2, tokens_per_step=2)
