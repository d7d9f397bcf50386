"""TRL's formats, and every way to get them wrong."""

import json

import pytest

from dllm_rl.tasks.jsonl import JsonLines

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
SAY = [{"role": "assistant", "content": "4"}]
OTHER = [{"role": "assistant", "content": "5"}]


@pytest.fixture
def load(tmp_path):
    def load(*rows, **options):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return JsonLines(JsonLines.Config(train_file=str(path), **options)).examples("train")

    return load


def test_prompt_only(load):
    text, number = load({"prompt": "2+2?", "answer": "4", "level": 3}, {"prompt": "2.5?", "answer": 2.5, "level": 1})
    assert (text.prompt, text.answer, text.completion, dict(text.columns)) == ("2+2?", "4", None, {"level": 3})
    assert number.answer == "2.5" and text.uid != number.uid
    (conversation,) = load({"prompt": ASK})
    assert conversation.prompt == ASK and conversation.answer == ""


def test_prompt_completion(load):
    assert load({"prompt": "2+2?", "completion": "4"})[0].completion == "4"
    assert load({"prompt": ASK, "completion": SAY})[0].completion == "4"


def test_preference(load):
    for row in ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {"prompt": ASK, "chosen": SAY, "rejected": OTHER}):
        (example,) = load(row)
        assert (example.chosen, example.rejected, example.completion) == ("4", "5", None)


def test_column_names_are_the_users(load):
    (example,) = load({"question": "2+2?", "gold": "4", "answer": "seen"}, prompt="question", answer="gold")
    assert (example.prompt, example.answer, dict(example.columns)) == ("2+2?", "4", {"answer": "seen"})


GOOD = {"prompt": "2+2?", "answer": "4"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2+2?"}, "no column 'prompt'; the row has question"),
        ({"prompt": ""}, "expected text or a list of messages, not empty"),
        ({"prompt": 7}, "column 'prompt' is 7"),
        ({"prompt": []}, "not empty"),
        ({"prompt": ["hi"]}, "message 1 is 'hi'"),
        ({"prompt": [{"role": "user"}]}, "message 1"),
        ({"prompt": [{"role": "bot", "content": "hi"}]}, "one of system, user, assistant, tool"),
        ({"prompt": [{"role": "user", "content": ["hi"]}]}, "message 1"),
        ({"prompt": [*ASK, *SAY]}, "ends with an assistant message"),
        ({"prompt": "2+2?", "completion": SAY}, "is a message list, but the prompt is text"),
        ({"prompt": ASK, "completion": "4"}, "is text, but the prompt is a message list"),
        ({"prompt": ASK, "completion": [*SAY, *ASK, *SAY]}, "exactly one assistant message"),
        ({"prompt": "2+2?", "chosen": "4"}, "both 'chosen' and 'rejected'"),
        ({"prompt": "2+2?", "completion": "4", "chosen": "4", "rejected": "5"}, "a row has 'completion', or both"),
        ({"prompt": "2+2?", "answer": None}, "column 'answer' is None"),
        ({"prompt": "2+2?", "answer": ["4"]}, "column 'answer'"),
        ({"prompt": "2+2?", "answer": "4", "completions": "x"}, "column 'completions' has the name of an argument"),
        (
            {"prompt": "2+2?", "answer": "4", "completion": "4"},
            "is prompt-completion text with 'answer', but the first",
        ),
        ({"prompt": "2+2?"}, "prompt-only text without 'answer', but the first row is prompt-only text with"),
        ({"prompt": ASK, "answer": "4"}, "prompt-only conversation"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(load, row, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(GOOD, row)
    assert "mine.jsonl, line 2" in str(caught.value)


def test_without_a_test_file_there_are_no_test_rows(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD))
    assert JsonLines(JsonLines.Config(train_file=str(path))).examples("test") == []
    assert len(JsonLines(JsonLines.Config(train_file=str(path), test_file=str(path))).examples("test")) == 1


def test_rewards_and_canary_follow_the_users_words(load):
    task = JsonLines(JsonLines.Config(train_file="x.jsonl", success="math_answer", gold="It is {answer}."))
    assert task.rewards == ("math_answer",) and task.success == "math_answer"
    assert JsonLines(JsonLines.Config(train_file="x.jsonl")).rewards == ()
    assert task.self_test(load(GOOD)[0]) == ("It is 4.", "")
    assert task.self_test(load({"prompt": "2+2?", "completion": "4"})[0]) == ("4", "")
    with pytest.raises(ValueError, match="neither completion nor answer"):
        task.self_test(load({"prompt": "2+2?"})[0])
