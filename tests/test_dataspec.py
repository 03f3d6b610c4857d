"""Dataset specs: which rows they mean, tokenized once, and what can be wrong with them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import save_tokenizer
from transformers import AutoTokenizer, LlamaConfig

from exl3.errors import UserError
from exl3.evaluate import dataspec
from exl3.evaluate.cache import cache_folder
from exl3.evaluate.dataspec import check_context, load_dataspec
from exl3.evaluate.rows import check_tokens

TEXT = "the quick brown fox and the lazy dog, again and again. " * 12
MISSING = object()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXL3_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def spec(tmp_path, tokenizer):
    """Writes a spec with changes (MISSING: without the key) and returns its path."""
    (tmp_path / "text.txt").write_text(TEXT)

    def write(**changes):
        content = {
            "tokenize_fn": "transformers",
            "tokenizer_dir": str(tokenizer),
            "dataset": "text.txt",
            "eval_stride": 7,
            "eval_len": 16,
            "max_rows": 5,
            **changes,
        }
        path = tmp_path / "spec.json"
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not MISSING}))
        return path

    return write


def expected(tokenizer, text, stride, length, rows):
    ids = AutoTokenizer.from_pretrained(tokenizer)(text)["input_ids"]
    starts = range(0, len(ids) - length, stride)
    return torch.tensor([ids[a : a + length] for a in starts])[:rows]


@pytest.mark.parametrize("most", [5, 0, None, MISSING])
def test_rows_are_windows_of_the_whole_text(spec, tokenizer, most):
    rows = load_dataspec(spec(max_rows=most)).rows()
    assert rows.dtype == torch.int64
    assert torch.equal(rows, expected(tokenizer, TEXT, 7, 16, 5 if most == 5 else None))


def test_special_tokens_are_the_tokenizers_default(spec, tmp_path, tokenizer):
    from transformers import PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    backend = loaded.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    bos = loaded.bos_token_id
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(
        tmp_path / "with_bos"
    )
    rows = load_dataspec(spec(tokenizer_dir="with_bos")).rows()
    assert rows[0, 0] == bos
    assert (rows == bos).sum() == 1


def test_documents_are_joined_by_blank_lines(spec, tmp_path, tokenizer):
    documents = [TEXT[:200], TEXT[200:]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet")
    wanted = expected(tokenizer, "\n\n".join(documents), 7, 16, 5)
    for name in ("a.jsonl", "a.parquet"):
        assert torch.equal(load_dataspec(spec(dataset=name)).rows(), wanted)


def test_datasets_have_config_split_and_column(spec, tokenizer, monkeypatch):
    asked = []

    def read(*arguments):
        asked.append(arguments)
        return [TEXT]

    monkeypatch.setattr(dataspec, "read_dataset", read)
    rows = load_dataspec(spec(dataset="a/b")).rows()
    assert torch.equal(rows, expected(tokenizer, TEXT, 7, 16, 5))
    load_dataspec(spec(dataset="a/b", config="c", split="train", column="d")).rows()
    load_dataspec(spec(dataset="a/b", dataset_split="train", text_column="d")).rows()
    load_dataspec(spec(dataset="wiki2")).rows()
    assert asked == [
        ("a/b", "test", None),
        ("a/b:c", "train", "d"),
        ("a/b", "train", "d"),
        ("Salesforce/wikitext:wikitext-2-raw-v1", "test", "text"),
    ]


def test_a_path_is_beside_the_spec_before_it_is_in_the_current_folder(
    spec, tmp_path, monkeypatch, tokenizer
):
    current = tmp_path / "current"
    current.mkdir()
    monkeypatch.chdir(current)
    (current / "text.txt").write_text("something else entirely. " * 30)
    (current / "other.txt").write_text(TEXT)
    assert load_dataspec(spec()).dataset == str(tmp_path / "text.txt")
    rows = load_dataspec(spec(dataset="other.txt")).rows()
    assert torch.equal(rows, expected(tokenizer, TEXT, 7, 16, 5))


def test_wiki2_offline_asks_for_a_local_copy(spec, monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError) as error:
        load_dataspec(spec(dataset="wiki2")).rows()
    message = str(error.value)
    assert "spec.json: dataset: wiki2" in message
    assert "no route to the hub)" in message
    assert '"dataset": "path/to/wiki.test.txt"' in message


def test_rows_are_tokenized_once(spec, tmp_path, tokenizer, monkeypatch):
    before = load_dataspec(spec()).rows()
    with monkeypatch.context() as patch:
        patch.setattr(dataspec, "load_tokenizer", lambda *_: pytest.fail("tokenized again"))
        assert torch.equal(load_dataspec(spec()).rows(), before)
        (tmp_path / "moved.txt").write_text(TEXT)  # what counts is the content
        assert torch.equal(load_dataspec(spec(dataset="moved.txt")).rows(), before)
    (kept,) = (cache_folder() / "tokens").iterdir()
    kept.write_bytes(kept.read_bytes()[:-8])  # damaged: made again
    assert torch.equal(load_dataspec(spec()).rows(), before)


def test_what_changes_the_rows_changes_the_cached_ones(spec, tmp_path, tokenizer):
    other = tmp_path / "tokenizer"
    save_tokenizer(other, 270)
    variants = (
        {}, {"eval_len": 15}, {"eval_stride": 8}, {"max_rows": 4}, {"tokenizer_dir": str(other)}
    )  # fmt: skip
    for changes in variants:
        load_dataspec(spec(**changes)).rows()
    path = spec()
    (tmp_path / "text.txt").write_text(TEXT + ".")
    load_dataspec(path).rows()
    assert len(list((cache_folder() / "tokens").iterdir())) == len(variants) + 1


def test_it_works_without_a_cache(spec, tmp_path, tokenizer):
    (tmp_path / "cache").write_text("a file where the folder should be")
    rows = load_dataspec(spec()).rows()
    assert torch.equal(rows, expected(tokenizer, TEXT, 7, 16, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenize_fn": MISSING}, "tokenize_fn is missing"),
        ({"tokenizer_dir": MISSING}, "tokenizer_dir is missing"),
        ({"dataset": MISSING}, "dataset is missing"),
        ({"eval_stride": MISSING}, "eval_stride is missing"),
        ({"eval_len": MISSING}, "eval_len is missing"),
        ({"dataset": None}, "dataset is missing"),
        ({"dataset": ["wiki2"]}, 'dataset is \\["wiki2"\\], but must be a text'),
        ({"dataset": " "}, "dataset is empty"),
        ({"eval_len": "2048"}, 'eval_len is "2048", but must be a whole number'),
        ({"eval_len": 1.5}, "eval_len is 1.5, but"),
        ({"max_rows": True}, "max_rows is true, but"),
        ({"eval_len": 1}, "eval_len is 1, but must be at least 2"),
        ({"eval_stride": 0}, "eval_stride is 0, but must be at least 1"),
        ({"max_rows": -1}, "max_rows is -1, but must be at least 0"),
        ({"tokenize_fn": "qtip"}, "tokenize_fn: qtip is an engine"),
        ({"tokenize_fn": "sentencepiece"}, "tokenize_fn: sentencepiece is not known"),
        ({"tokenizer_dir": "nowhere"}, "tokenizer_dir: there is no folder nowhere"),
        ({"dataset": "nowhere.txt"}, "dataset: there is no file nowhere.txt"),
        ({"dataset": "/nowhere/wiki"}, "dataset: there is no file /nowhere/wiki"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_file_and_key(spec, changes, message):
    with pytest.raises(UserError, match=f"spec.json: {message}") as error:
        load_dataspec(spec(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "a list, as model specs are"),
        (b"3", "not a JSON object"),
    ],
)
def test_files_that_are_no_spec(tmp_path, content, message):
    (tmp_path / "spec.json").write_bytes(content)
    with pytest.raises(UserError, match=f"spec.json: {message}"):
        load_dataspec(tmp_path / "spec.json")


def test_a_spec_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load_dataspec(tmp_path / "spec.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_dataspec(tmp_path)


def test_texts_that_give_no_rows(spec, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"spec.json: dataset: .*empty.txt: .* holds no text"):
        load_dataspec(spec(dataset="empty.txt")).rows()
    with pytest.raises(UserError, match=r"spec.json: eval_len: .*too few for rows of 5000"):
        load_dataspec(spec(eval_len=5000)).rows()


def test_a_folder_without_a_tokenizer(spec, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"spec.json: tokenizer_dir: the tokenizer of .*bare"):
        load_dataspec(spec(tokenizer_dir="bare")).rows()


def test_unknown_keys_are_said(spec):
    assert load_dataspec(spec()).notes == ()
    (ignored,) = load_dataspec(spec(max_row=3, chat_template=False)).notes
    assert "max_row: not known here" in ignored
    (warning,) = load_dataspec(spec(chat_template=True, warmup_tokens=128)).notes
    assert warning.startswith("Warning:")
    assert "chat_template, warmup_tokens" in warning


def test_rows_must_fit_the_model(spec):
    read = load_dataspec(spec())
    check_context(read, LlamaConfig(max_position_embeddings=16))
    with pytest.raises(UserError, match=r"spec.json: eval_len: rows of 16 .* 15 tokens"):
        check_context(read, LlamaConfig(max_position_embeddings=15))
    rows = torch.tensor([[3, 9]])
    check_tokens("spec.json: tokenizer_dir", rows, 10, "tiny")
    with pytest.raises(UserError, match=r"spec.json: tokenizer_dir: .* token 9"):
        check_tokens("spec.json: tokenizer_dir", rows, 9, "tiny")
