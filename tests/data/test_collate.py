from types import SimpleNamespace

import pytest
import torch

from dllm_rl.data.collate import collate, completion_texts, supervised
from dllm_rl.diffusion.staleness import oldest_weights
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.types import GIVEN, Prompt, Trajectory, WeightsVersion

PAD, MASK, EOS = 0, 1, 2  # of character_tokenizer


def blocks(origin, size=2):
    """What a batch asks a denoiser."""
    return SimpleNamespace(mask_id=MASK, pad_id=PAD, eos_id=EOS, block_size=size, block_origin=origin)


ROWS = blocks("response", size=None)


def trajectory(prompt, canvas, *, length, steps=None, finish="eos", exact=True, step=0) -> Trajectory:
    tokens = torch.tensor([*prompt, *canvas])
    unmask = torch.tensor([GIVEN] * len(prompt) + (steps or list(range(len(canvas)))))
    return Trajectory(
        prompt_uid="p",
        sample=0,
        tokens=tokens,
        prompt_length=len(prompt),
        completion_length=length,
        events=torch.empty(0, 3, dtype=torch.int64),
        unmask_step=unmask,
        behaviour_logp=torch.where(unmask == GIVEN, 0.0, -1.0),
        num_forwards=len(canvas),
        finish=finish,
        exact=exact,
        weights=WeightsVersion(step=step, digest="d"),
        weights_step=torch.where(unmask == GIVEN, GIVEN, step),
    )


def prompt(uid, ids) -> Prompt:
    return Prompt(uid=uid, token_ids=tuple(ids), text="", answer="", task="t")


def test_collate_pads_on_the_right_and_splits_completion_from_tail():
    batch = collate(
        [
            trajectory([5], [6, EOS, EOS, EOS], length=2, step=3),
            trajectory([5, 6, 7], [8, 9, 8, 9], length=4, finish="length", exact=False),
        ],
        ROWS,
        group=[4, 9],
    )
    T, F = True, False
    assert batch.tokens.tolist() == [[5, 6, EOS, EOS, EOS, PAD, PAD], [5, 6, 7, 8, 9, 8, 9]]
    assert batch.valid.tolist() == [[T, T, T, T, T, F, F], [T] * 7]
    assert batch.completion.tolist() == [[F, T, T, F, F, F, F], [F, F, F, T, T, T, T]]
    assert batch.tail.tolist() == [[F, F, F, T, T, F, F], [F] * 7]
    assert batch.unmask_step.tolist() == [[-1, 0, 1, 2, 3, -1, -1], [-1, -1, -1, 0, 1, 2, 3]]
    assert batch.behaviour_logp.dtype == torch.float32 and batch.behaviour_logp[0].tolist() == [0, -1, -1, -1, -1, 0, 0]
    assert batch.prompt_length.tolist() == [1, 3] and batch.group.tolist() == [4, 9]
    assert batch.weights_step.tolist() == [[-1, 3, 3, 3, 3, -1, -1], [-1, -1, -1, 0, 0, 0, 0]]
    assert oldest_weights(batch) == 0 and batch.num_forwards.tolist() == [4, 4]
    assert batch.exact is False and batch.block_ids is None


def test_given_positions_of_the_canvas_are_hints():
    batch = collate([trajectory([5], [6, 7, EOS], length=3, steps=[0, GIVEN, 1])], ROWS, group=[0])
    assert batch.completion.tolist() == [[False, True, True, True]]
    assert batch.hint.tolist() == [[False, False, True, False]]
    assert batch.tokens_per_forward.tolist() == pytest.approx([2 / 3])


def test_blocks_follow_the_origin():
    rows = [trajectory([5, 5, 5], [6, 6, 6, EOS], length=4)]
    response = collate(rows, blocks("response"), group=[0])
    sequence = collate(rows, blocks("sequence"), group=[0])
    assert response.block_ids.tolist() == [[-2, -1, -1, 0, 0, 1, 1]]
    assert sequence.block_ids.tolist() == [[0, 0, 1, 1, 2, 2, 3]]


def test_supervised_ends_in_eos_and_can_fill_the_canvas():
    prompts, completions = [prompt("a", [5]), prompt("b", [5, 6])], [[7, 8], [9]]
    plain = supervised(prompts, completions, ROWS, group=range(len(prompts)), max_new_tokens=4)
    assert plain.tokens.tolist() == [[5, 7, 8, EOS], [5, 6, 9, EOS]]
    assert plain.completion.tolist() == [[False, True, True, True], [False, False, True, True]]
    filled = supervised(prompts, completions, ROWS, group=range(len(prompts)), max_new_tokens=4, pad_to_canvas=True)
    assert filled.tokens.tolist() == [[5, 7, 8, EOS, EOS, PAD], [5, 6, 9, EOS, EOS, EOS]]
    assert filled.completion.sum(-1).tolist() == [4, 4]
    assert filled.group.tolist() == [0, 1] and not filled.tail.any()


def test_a_completion_that_fills_the_canvas_needs_no_eos():
    batch = supervised([prompt("a", [5])], [[7, 8]], ROWS, group=[0], max_new_tokens=2)
    assert batch.tokens.tolist() == [[5, 7, 8]]


def test_a_completion_that_does_not_fit_is_refused_never_cut():
    with pytest.raises(ValueError, match=r"'b': its completion has 3 tokens, sampling\.max_new_tokens is 2"):
        supervised([prompt("b", [5])], [[7, 8, 9]], ROWS, group=[0], max_new_tokens=2)
    with pytest.raises(ValueError, match="'b': its completion is empty"):
        supervised([prompt("b", [5])], [[]], ROWS, group=[0], max_new_tokens=2)


def test_a_completion_with_the_mask_token_is_refused():
    with pytest.raises(ValueError, match="'b': token 1 of its completion is the model's mask token; take its text out"):
        supervised([prompt("b", [5])], [[7, MASK, 9]], ROWS, group=[0], max_new_tokens=3)


def test_texts_end_before_the_end_token_and_records_hide_nothing():
    tokenizer = character_tokenizer("12 \n")  # ids from 3
    rows = [
        trajectory([3], [3, 4, EOS, EOS], length=3),
        trajectory([3], [3, 4, 3, 4], length=4, finish="length"),
        trajectory([3], [3, MASK, 5, 6], length=4, finish="length"),
        trajectory([3], [EOS, EOS, EOS, EOS], length=1),
    ]
    assert completion_texts(rows, tokenizer, special=True) == ["12", "1212", "1<mask> \n", ""]
    assert completion_texts(rows, tokenizer) == ["12", "1212", "1 \n", ""]
