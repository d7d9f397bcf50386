import pickle

import pytest
import torch

from dllm_rl.diffusion.layout import block_index
from dllm_rl.protocols.denoiser import Denoiser
from dllm_rl.seeding import generator_for

TOLERANCE = 1e-10  # float64
FULL = ["llada", "dream", "tiny"]


def rows(denoiser, num_rows=3, length=10):
    tokens = torch.randint(3, denoiser.vocab_size, (num_rows, length), generator=generator_for(1))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 4::2] = True
    return tokens, mask, torch.ones_like(mask)


def blocks_for(denoiser, tokens):
    if denoiser.block_size is None:
        return None
    return block_index(torch.full((len(tokens),), 4), tokens.shape[1], denoiser.block_size, denoiser.block_origin)


@pytest.mark.parametrize("family", [*FULL, "sdar"])
def test_satisfies_the_protocol(make, family):
    denoiser = make(family)
    assert isinstance(denoiser, Denoiser)
    tokens, mask, valid = rows(denoiser)
    hidden = denoiser.hidden_states(tokens, mask, valid, blocks_for(denoiser, tokens))
    assert hidden.shape == (3, 10, 24)
    assert denoiser.unembed(hidden[:, 5]).shape == (3, denoiser.vocab_size)


@pytest.mark.parametrize("family", [*FULL, "sdar"])
def test_can_be_sent_to_another_process(make, family):
    denoiser = make(family)
    tokens, mask, valid = rows(denoiser)
    there = pickle.loads(pickle.dumps(denoiser))
    blocks = blocks_for(denoiser, tokens)
    assert torch.equal(
        there.hidden_states(tokens, mask, valid, blocks), denoiser.hidden_states(tokens, mask, valid, blocks)
    )


@pytest.mark.parametrize("family", FULL)
def test_attention_is_bidirectional(make, family):
    # Guards against a transformers version that would put a causal mask over ours.
    denoiser = make(family)
    tokens, mask, valid = rows(denoiser)
    changed = tokens.clone()
    changed[:, 9] = (tokens[:, 9] - 3 + 1) % (denoiser.vocab_size - 3) + 3
    before, after = (denoiser.hidden_states(t, mask, valid) for t in (tokens, changed))
    assert (before - after)[:, 2].abs().min(-1).values.max() > 1e-5


@pytest.mark.parametrize("family", [*FULL, "sdar"])
def test_hidden_tokens_and_padding_do_not_leak(make, family):
    denoiser = make(family, dtype=torch.float64)
    tokens, mask, valid = rows(denoiser)
    valid[0, 7:] = False
    scored = mask & valid
    blocks = blocks_for(denoiser, tokens)
    if family == "sdar":  # clean blocks see their own tokens: only the last valid block is hidden for all readers
        mask = mask & (blocks == blocks[0, 6])
        scored = mask & valid & (blocks == blocks[0, 6])
    base = denoiser.hidden_states(tokens, mask, valid, blocks)
    other = torch.where(scored | ~valid, (tokens + 5) % 20 + 3, tokens)
    assert not torch.equal(other, tokens)
    assert torch.equal(denoiser.hidden_states(other, mask, valid, blocks)[scored], base[scored])


@pytest.mark.parametrize("family", [*FULL, "sdar"])
def test_padding_changes_nothing(make, family):
    denoiser = make(family, dtype=torch.float64)
    tokens, mask, valid = rows(denoiser)
    wide = [torch.cat([x, torch.zeros(3, 6, dtype=x.dtype)], dim=1) for x in (tokens, mask, valid)]
    base = denoiser.hidden_states(tokens, mask, valid, blocks_for(denoiser, tokens))
    padded = denoiser.hidden_states(*wide, blocks_for(denoiser, wide[0]))
    assert (padded[:, :10] - base).abs().max() < TOLERANCE
    assert padded.isfinite().all()


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_a_row_without_any_valid_key_stays_finite(make, family):
    denoiser = make(family)
    tokens, mask, valid = rows(denoiser)
    valid[1] = False
    hidden = denoiser.hidden_states(tokens, mask, valid, blocks_for(denoiser, tokens))
    assert hidden.isfinite().all()
    hidden.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in denoiser.module.parameters())


def test_shift_moves_the_network_output_by_one_and_protects_position_zero(make):
    denoiser = make("dream")
    tokens, mask, valid = rows(denoiser)
    shifted = denoiser.hidden_states(tokens, mask, valid)
    noised = torch.where(mask, denoiser.mask_id, tokens)
    raw = denoiser.module.model(input_ids=noised, attention_mask=valid[:, None, None, :]).last_hidden_state
    assert torch.equal(shifted[:, 1:], raw[:, :-1])
    mask[2, 0] = True
    with pytest.raises(ValueError, match="position 0 is hidden"):
        denoiser.hidden_states(tokens, mask, valid)


@pytest.mark.parametrize("origin", ["response", "sequence"])
@pytest.mark.parametrize("prompts", [[5, 2, 7], [4, 8, 0 + 4], [1, 3, 2]])
def test_cached_blocks_equal_the_clean_and_noised_layout(make, origin, prompts):
    size, num_blocks = 4, 4
    denoiser = make("sdar", block_size=size, block_origin=origin, dtype=torch.float64)
    prompt = torch.tensor(prompts)
    start = prompt if origin == "response" else prompt // size * size  # first position that is not prefilled
    length = int(start.max()) + num_blocks * size
    position = torch.arange(length)
    valid = position < (start + num_blocks * size)[:, None]
    tokens = torch.randint(3, denoiser.vocab_size, (3, length), generator=generator_for(2))
    blocks = block_index(prompt, length, size, origin)
    width = int(start.max())
    cache = denoiser.prefill(tokens[:, :width], (position < start[:, None])[:, :width], blocks[:, :width])
    row_ids = torch.arange(3)
    for number in range(num_blocks):
        if number == 2:  # one row finishes, the others change places
            kept = torch.tensor([2, 0])
            cache.keep_rows(kept)
            row_ids = row_ids[kept]
        at = start[row_ids, None] + number * size + torch.arange(size)
        window = tokens[row_ids].gather(1, at)
        hide = torch.rand(window.shape, generator=generator_for(3, number)) < 0.6
        mask = torch.zeros(len(row_ids), length, dtype=torch.bool).scatter(1, at, hide)
        expected = denoiser.hidden_states(tokens[row_ids], mask, valid[row_ids], blocks[row_ids])
        expected = expected.gather(1, at[..., None].expand(-1, -1, expected.shape[-1]))
        everything = torch.ones_like(hide)
        noised = torch.where(hide, denoiser.mask_id, window)
        for _ in range(2):  # a forward that does not commit leaves the cache as it was
            ours = denoiser.extend(cache, noised, at, everything, commit=False)
            assert (ours - expected).abs().max() < TOLERANCE
        denoiser.extend(cache, window, at, everything, commit=True)


def test_invalid_window_positions_are_not_attended_to(make):
    denoiser = make("sdar", dtype=torch.float64)
    tokens, _, valid = rows(denoiser)
    cache = denoiser.prefill(tokens[:, :4], valid[:, :4], blocks_for(denoiser, tokens)[:, :4])
    at = torch.arange(4, 8).expand(3, 4)
    narrow = torch.tensor([True, True, False, False]).expand(3, 4)
    ours = denoiser.extend(cache, tokens[:, 4:8], at, narrow, commit=True)
    alone = denoiser.prefill(tokens[:, :4], valid[:, :4], blocks_for(denoiser, tokens)[:, :4])
    expected = denoiser.extend(alone, tokens[:, 4:6], at[:, :2], narrow[:, :2], commit=True)
    assert (ours[:, :2] - expected).abs().max() < TOLERANCE
    later = denoiser.extend(cache, tokens[:, :2], at[:, 2:], narrow[:, :2], commit=False)
    assert (
        later - denoiser.extend(alone, tokens[:, :2], at[:, 2:], narrow[:, :2], commit=False)
    ).abs().max() < TOLERANCE


def test_an_empty_prefix_and_a_row_without_prefix_work(make):
    denoiser = make("sdar", dtype=torch.float64)
    tokens, _, valid = rows(denoiser)
    blocks = blocks_for(denoiser, tokens)
    empty = denoiser.prefill(tokens[:, :0], valid[:, :0], blocks[:, :0])
    nothing_valid = denoiser.prefill(tokens[:, :4], torch.zeros_like(valid[:, :4]), blocks[:, :4])
    at = torch.arange(4).expand(3, 4)
    first = denoiser.extend(empty, tokens[:, :4], at, valid[:, :4], commit=False)
    assert first.isfinite().all()
    second = denoiser.extend(nothing_valid, tokens[:, :4], at, valid[:, :4], commit=False)
    assert (first - second).abs().max() < TOLERANCE


def test_the_cache_survives_training_mode_with_gradient_checkpointing(make):
    denoiser = make("sdar")
    tokens, _, valid = rows(denoiser)
    blocks = blocks_for(denoiser, tokens)
    at = torch.arange(4, 8).expand(3, 4)

    def decode():
        cache = denoiser.prefill(tokens[:, :4], valid[:, :4], blocks[:, :4])
        return denoiser.extend(cache, tokens[:, 4:8], at, valid[:, :4], commit=False)

    expected = decode()
    denoiser.module.train()
    denoiser.module.gradient_checkpointing_enable()
    assert torch.equal(decode(), expected)
    assert denoiser.module.training


@pytest.mark.parametrize(
    ("family", "call", "message"),
    [
        (
            "llada",
            lambda d, t, m, v: d.hidden_states(t.repeat(1, 7), m.repeat(1, 7), v.repeat(1, 7)),
            "70 tokens.*at most 64",
        ),
        ("llada", lambda d, t, m, v: d.hidden_states(t, m, v, t), "full attention"),
        ("sdar", lambda d, t, m, v: d.hidden_states(t, m, v), "block_ids .N, L. are required"),
        ("tiny", lambda d, t, m, v: d.prefill(t, v, t), "full attention"),
        ("tiny", lambda d, t, m, v: d.extend(None, t, t, v, commit=True), "full attention"),
    ],
)
def test_misuse_is_refused(make, family, call, message):
    denoiser = make(family)
    with pytest.raises(ValueError, match=message):
        call(denoiser, *rows(denoiser))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llada", {"block_size": 4}, "full attention"),
        ("sdar", {"block_size": None}, "needs tokens per block"),
        ("sdar", {"block_size": 4, "block_origin": "middle"}, "must be 'response' or 'sequence'"),
    ],
)
def test_block_options_are_checked(make, family, options, message):
    with pytest.raises(ValueError, match=message):
        make(family, **options)
