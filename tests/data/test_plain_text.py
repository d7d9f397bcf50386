"""Special tokens that users write are text; those of the chat template are special; nothing else changes."""

import pytest

from dllm_rl.data.plain_text import PlainText, encode_text
from dllm_rl.data.prompts import encode, encode_completion
from dllm_rl.models.tokenizers import byte_bpe_tokenizer
from dllm_rl.types import Example

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<mask>", "<eos>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["", "2+2?", "\n\n two\n", "don't <b>bold</b> | <|im_", "日本 ∂ß 🙂", "  ", "<think>four</think>"]


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_bpe_tokenizer(["user\n\n2+2? four don't\nassistant\n", "<|im_end|> <mask> <think>"] * 9, 330)
    made.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    made.add_tokens(["<think>", "</think>"])  # of the model's vocabulary, but not special: also in what users write
    made.chat_template = CHATML
    return made


def chat(*contents):
    return [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(contents)]


def example(prompt):
    return Example(uid="row-7", prompt=prompt, answer="4", task="sums", columns={})


def test_without_special_tokens_ids_are_those_of_the_tokenizer(tokenizer):
    for a in filter(None, TEXTS):
        assert list(encode(example(a), tokenizer).token_ids) == tokenizer.encode(a, add_special_tokens=False)
        for b in TEXTS:
            prompt = encode(example(chat(a, b, a)), tokenizer)
            assert prompt.text == tokenizer.apply_chat_template(
                chat(a, b, a), tokenize=False, add_generation_prompt=True
            )
            assert list(prompt.token_ids) == tokenizer.encode(prompt.text, add_special_tokens=False)
            completion = encode_completion(a, tokenizer, prompt=chat(b))
            assert completion == tokenizer.encode(a, add_special_tokens=False)


@pytest.mark.parametrize("token", SPECIAL)
@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_that_users_write_are_text(tokenizer, token, text):
    number = tokenizer.convert_tokens_to_ids(token)
    written = f"{text}{token}{text}"
    for ids in (encode(example(written), tokenizer).token_ids, encode_completion(written, tokenizer)):
        assert number not in ids and tokenizer.decode(ids) == written

    prompt = encode(example(chat(written, "four", written)), tokenizer, system_prompt=written)
    want = tokenizer.apply_chat_template(
        [{"role": "system", "content": written}, *chat(written, "four", written)],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt.text == want and tokenizer.decode(prompt.token_ids) == want
    # Exactly the special tokens that the template makes of harmless contents, in their order.
    harmless = tokenizer.encode(
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "x"}, *chat("x", "four", "x")], tokenize=False, add_generation_prompt=True
        )
    )
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL))
    assert [i for i in prompt.token_ids if i in special] == [i for i in harmless if i in special]
    # And text between two of them is what it is alone.
    opening, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    first = list(prompt.token_ids)[1 : list(prompt.token_ids).index(end)]
    assert prompt.token_ids[0] == opening and first == encode_text(f"system\n{written}", tokenizer)

    answer = encode_completion(written, tokenizer, prompt=chat(written))
    assert answer == encode_text(written, tokenizer)


def test_marks_are_characters_that_nobody_wrote(tokenizer):
    contents = ["\ue000<mask>", "\ue001 <eos><mask>"]
    plain = PlainText(contents, tokenizer)
    marked = [plain.mark(text) for text in contents]
    assert "<" not in "".join(marked) and [plain.unmark(text) for text in marked] == contents
    assert tokenizer.decode(plain.encode(marked[1] + "<eos>")) == contents[1] + "<eos>"
    assert plain.encode(marked[1] + "<eos>")[-1] == tokenizer.eos_token_id


def test_a_long_special_token_is_not_taken_for_a_short_one_in_it(tokenizer):
    other = byte_bpe_tokenizer(["a"], 300)
    other.add_special_tokens({"additional_special_tokens": ["<m", "<m>"]})
    plain = PlainText(["<m>", "<m"], other)
    long, short = other.convert_tokens_to_ids(["<m>", "<m"])
    assert plain.encode("<m>" + plain.mark("<m>")) == [long, *encode_text("<m>", other)]
    assert short not in plain.encode("<m>" + plain.mark("<m"))
