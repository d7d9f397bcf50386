import pytest

from dllm_rl.data.prompts import encode, encode_completion
from dllm_rl.models.tokenizers import byte_bpe_tokenizer, character_tokenizer
from dllm_rl.types import Example

CHAT = [{"role": "user", "content": "2+2?"}]


def example(prompt, **fields) -> Example:
    return Example(
        **{"uid": "row-7", "prompt": prompt, "answer": "4", "task": "sums", "columns": {"level": 1}} | fields
    )


@pytest.fixture(scope="module")
def characters():
    return character_tokenizer("0123456789+?=\n ")


@pytest.fixture(scope="module")
def bpe():
    return byte_bpe_tokenizer(["2+2? four", "3+3? six"], 300)


def test_text_is_taken_as_it_is(characters):
    prompt = encode(example("2+2=\n"), characters)
    assert (prompt.text, len(prompt.token_ids)) == ("2+2=\n", 5)
    assert characters.decode(list(prompt.token_ids)) == "2+2=\n"
    assert (prompt.uid, prompt.answer, prompt.task, prompt.columns) == ("row-7", "4", "sums", {"level": 1})


def test_a_conversation_goes_through_the_chat_template(bpe):
    assert encode(example(CHAT), bpe).text == "<|user|>\n2+2?\n<|assistant|>\n"
    assert encode(example(CHAT), bpe, system_prompt="Add.").text == "<|system|>\nAdd.\n<|user|>\n2+2?\n<|assistant|>\n"
    assert (
        encode(example("2+2?"), bpe, system_prompt="Add.").text == encode(example(CHAT), bpe, system_prompt="Add.").text
    )


def test_a_conversation_needs_a_chat_template(characters):
    with pytest.raises(ValueError, match="'row-7' is a conversation, but the tokenizer has no chat template"):
        encode(example(CHAT), characters)


def test_two_system_prompts_are_one_too_many(bpe):
    with pytest.raises(ValueError, match="has a system message of its own"):
        encode(example([{"role": "system", "content": "Be brief."}, *CHAT]), bpe, system_prompt="Add.")


def test_a_long_prompt_is_refused_never_cut(characters):
    assert len(encode(example("2+2="), characters, max_prompt_tokens=4).token_ids) == 4
    with pytest.raises(ValueError, match=r"'row-7': its prompt has 5 tokens, 4 are allowed; raise data.max_prompt_tok"):
        encode(example("12+2="), characters, max_prompt_tokens=4)


def test_what_the_tokenizer_drops_is_an_error(characters, bpe):
    with pytest.raises(ValueError, match="prompt of example 'row-7': the tokenizer cannot represent 'x'"):
        encode(example("2x2="), characters)
    with pytest.raises(ValueError, match="cannot represent"):
        encode(example("xyz"), characters)
    with pytest.raises(ValueError, match="its prompt is empty"):
        encode(example(""), characters)
    with pytest.raises(ValueError, match="completion of example 'row-7'"):
        encode_completion("4x", characters, uid="row-7")
    assert encode(example("naïve ½ \U0001f600"), bpe).text == "naïve ½ \U0001f600"  # bytes represent everything


def test_a_completion_carries_no_special_tokens(characters):
    assert characters.decode(encode_completion("4", characters)) == "4"


def test_a_completion_reads_as_the_template_writes_it(bpe):
    assert bpe.decode(encode_completion("four", bpe, prompt=CHAT)) == "four"
    thinking = byte_bpe_tokenizer(["2+2? four"], 300)
    thinking.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert thinking.decode(encode_completion("four", thinking, prompt=CHAT)) == "<think></think>four"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}",  # rewrites the completion
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",  # rewrites the prompt
    ],
)
def test_a_template_that_rewrites_what_went_before_is_refused(bpe, template):
    odd = byte_bpe_tokenizer(["2+2? four"], 300)
    odd.chat_template = template
    with pytest.raises(ValueError, match="completion of example 'row-7': the chat template does not render"):
        encode_completion(" four ", odd, uid="row-7", prompt=CHAT)


def test_a_template_that_cannot_be_rendered_is_refused_in_one_line(bpe):
    for template in ("{% for m in messages %}", "{{ raise_exception('roles must alternate') }}"):
        odd = byte_bpe_tokenizer(["2+2? four"], 300)
        odd.chat_template = template
        with pytest.raises(ValueError, match=r"chat template refuses a conversation: .*data\.chat_template") as e:
            encode(example(CHAT), odd)
        assert "\n" not in str(e.value)
