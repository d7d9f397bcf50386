"""Small files in the published formats of GSM8K and MATH."""

import json

import pytest

from dllm_rl.tasks.math_word import GSM8K, MATH

GSM8K_ROWS = [
    {
        "question": "How many?",
        "answer": "He has 48/2 = <<48/2=24>>24 left.\nSo 24+1,000=<<24+1000=1024>>1,024.\n#### 1,024",
    },
    {"question": "Colder?", "answer": "It is minus five.\n#### -5"},
]
MATH_ROWS = [
    {"problem": "Half?", "answer": "\\frac{1}{2}"},
    {"problem": "Set?", "solution": "First \\boxed{0}, no: $\\boxed{\\left\\{ 1, \\frac{2}{3} \\right.}$ done."},
    {"problem": "Both?", "answer": "7", "solution": "Clearly $\\boxed{7}$."},
]


@pytest.fixture
def file(tmp_path):
    def write(rows, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def gsm8k(path, **options) -> GSM8K:
    return GSM8K(GSM8K.Config(train_file=path, test_file=path, **options))


def test_gsm8k_rows(file):
    first, second = gsm8k(file(GSM8K_ROWS)).examples("train")
    assert (first.answer, second.answer) == ("1024", "-5")
    assert first.completion == "He has 48/2 = 24 left.\nSo 24+1,000=1,024.\n\\boxed{1024}"
    assert first.prompt[0]["role"] == "user" and first.prompt[0]["content"].startswith("How many?\n\n")
    assert "\\boxed{}" in first.prompt[0]["content"]
    assert first.uid != second.uid != gsm8k(file(GSM8K_ROWS)).examples("test")[1].uid


def test_plain_text_prompts_for_base_models(file):
    prompt = gsm8k(file(GSM8K_ROWS), chat=False).examples("train")[0].prompt
    assert isinstance(prompt, str) and prompt.endswith("\n\n")


def test_math_rows(file):
    path = file(MATH_ROWS)
    examples = MATH(MATH.Config(train_file=path, test_file=path)).examples("test")
    assert [e.answer for e in examples] == ["\\frac{1}{2}", "\\left\\{ 1, \\frac{2}{3} \\right.", "7"]
    assert examples[0].completion == "\\boxed{\\frac{1}{2}}"  # no solution to imitate: the answer alone
    assert examples[2].completion == "Clearly $\\boxed{7}$."


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (GSM8K, {"question": "q", "answer": "no marker 5"}, "does not end in '#### <number>'"),
        (GSM8K, {"question": "q", "answer": "x #### "}, "does not end in '#### <number>'"),
        (GSM8K, {"problem": "q", "answer": "#### 5"}, "no column 'question'"),
        (MATH, {"problem": "q", "answer": None}, "column 'answer' is None"),
        (MATH, {"problem": "q", "solution": "\\boxed{1"}, "no \\\\boxed{} answer"),
        (MATH, {"problem": "q"}, "neither 'answer' nor 'solution'"),
    ],
)
def test_malformed_rows_are_all_named_at_once(file, task, row, message):
    good = (GSM8K_ROWS if task is GSM8K else MATH_ROWS)[0]
    path = file([good, row, good, row])
    with pytest.raises(ValueError, match=message) as caught:
        task(task.Config(train_file=path, test_file=path)).examples("train")
    assert "line 2" in str(caught.value) and "data.task.train_skip=[2, 4]" in str(caught.value)
    examples = task(task.Config(train_file=path, test_file=path, train_skip=(2, 4))).examples("train")
    assert [e.uid.split("-")[-1] for e in examples] == ["1", "3"]  # other rows keep their names


def test_limit_and_files(file):
    path = file(GSM8K_ROWS)
    assert len(gsm8k(path, limit=1).examples("train")) == 1
    with pytest.raises(ValueError, match="limit = 0"):
        gsm8k(path, limit=0)
    with pytest.raises(ValueError, match=r"data\.task\.test_file is missing"):
        GSM8K(GSM8K.Config(train_file=path)).examples("test")
    with pytest.raises(ValueError, match="leaves out every row"):
        gsm8k(path, train_skip=(1, 2)).examples("train")


def test_the_canary_is_boxed(file):
    task = gsm8k(file(GSM8K_ROWS))
    gold, wrong = task.self_test(task.examples("train")[0])
    assert gold == "\\boxed{1024}" != wrong


def test_the_hub_layout_is_read_through_datasets(tmp_path, monkeypatch):
    """A folder laid out as on the hub; ``datasets`` treats both alike."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K_ROWS))
    files = "[{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files: {files}\n---\n")
    task = GSM8K(GSM8K.Config(hub=str(tmp_path), limit=1))
    assert [e.answer for e in task.examples("test")] == ["1024"]
    with pytest.raises(ValueError, match="main/train, row 1: no column 'problem'"):
        MATH(MATH.Config(hub=str(tmp_path))).examples("train")


def test_a_data_set_that_cannot_be_loaded_says_how_to_go_on(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be loaded from the hub .*give local files instead"):
        GSM8K(GSM8K.Config(hub=str(tmp_path / "nowhere"))).examples("train")
