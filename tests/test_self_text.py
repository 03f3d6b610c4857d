"""Text that a model writes itself: drawn from its predictions, resumed, refused."""

import json

import pytest
import torch
from tiny_models import save_tiny, save_tokenizer

from exl3.commands import self_text as command
from exl3.data.tokenizer import load_tokenizer
from exl3.errors import UserError
from exl3.evaluate.engines.place import Place
from exl3.evaluate.engines.stock import TransformersEngine
from exl3.jobs import self_text
from exl3.jobs.self_text import BATCH, draw

WORDS = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self") / "model"
    save_tiny("llama", folder, vocab_size=WORDS, max_position_embeddings=64)
    save_tokenizer(folder)
    return folder


def write(model, out, *more, rows=BATCH + 4):
    given = ("-i", model, "-o", out, "-r", rows, "-l", 12, "-d", "cpu", *more)
    command.main([str(value) for value in given])
    return [json.loads(line)["text"] for line in out.read_text().splitlines()]


def test_a_text_a_row_the_same_every_time(model, tmp_path, capsys):
    found = write(model, tmp_path / "a.jsonl")
    assert len(found) == BATCH + 4 and len(set(found)) > BATCH
    write(model, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert write(model, tmp_path / "c.jsonl", "--seed", 1) != found
    capsys.readouterr()
    write(model, tmp_path / "a.jsonl")
    assert "complete already" in capsys.readouterr().out


def test_first_rows_do_not_depend_on_how_many_follow(model, tmp_path):
    few, many = (write(model, tmp_path / f"{n}.jsonl", rows=n) for n in (3, BATCH + 1))
    assert many[:3] == few


def test_tokens_come_as_often_as_the_model_says(model):
    """The second token of many rows against the mean of the predictions behind their first."""
    stock = TransformersEngine(Place(model), torch.device("cpu"), False).model()
    tokenizer = load_tokenizer(model)
    stock.lm_head.weight.data *= 20  # far from even
    ids = torch.cat([draw(stock, tokenizer, 2, seed) for seed in range(60)])
    begun, drawn = ids[:, :-1], ids[:, -1]
    expected = stock(begun).logits[:, -1].softmax(-1).mean(0)
    counts = torch.bincount(drawn, minlength=WORDS) / len(drawn)
    error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((counts - expected).abs() < 5 * error + 1e-3).all()
    assert expected.max() > 3 / WORDS and begun[:, -1].unique().numel() > WORDS / 3


def test_a_killed_job_goes_on_and_ends_in_the_same_bytes(model, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write(model, whole)
    drawn = []

    def dies(*given, **more):
        drawn.append(given[3])
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(*given, **more)

    monkeypatch.setattr(self_text, "draw", dies)
    with pytest.raises(KeyboardInterrupt):
        write(model, cut)
    assert not cut.exists()
    partial = tmp_path / "cut.jsonl.partial"
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == BATCH
    partial.write_bytes(b"".join(lines[:-1]) + lines[-1][:7])  # cut off in a line
    drawn.append("not the second again")
    write(model, cut)
    assert cut.read_bytes() == whole.read_bytes()
    first, second = drawn[:2]
    assert drawn[3:] == [first, second]  # the first batch again, for its last row
    assert not partial.exists()


def test_what_is_there_stays(model, tmp_path):
    out = tmp_path / "mine.jsonl"
    out.write_text('{"text": "mine"}\n')
    with pytest.raises(UserError, match="something else"):
        write(model, out)
    assert out.read_text() == '{"text": "mine"}\n'
    begun = tmp_path / "other.jsonl.partial"
    for content in ('{"text": "mine"}\n', "a note without an end"):
        begun.write_text(content)
        with pytest.raises(UserError, match="something else; delete it"):
            write(model, tmp_path / "other.jsonl")
        assert begun.read_text() == content
    begun.write_text('{"text": "cut sho')  # of a first row
    assert len(write(model, tmp_path / "other.jsonl", rows=1)) == 1


def test_bad_input(model, tmp_path, monkeypatch):
    for out, more, said in (
        ("a.txt", (), "ends in .jsonl"),
        ("no/a.jsonl", (), "is missing"),
        ("a.jsonl", ("-l", 7), "at least 8 tokens"),
        ("a.jsonl", ("--seed", -1), "0 or more"),
    ):
        with pytest.raises(UserError, match=said):
            write(model, tmp_path / out, *more)
    monkeypatch.setattr(self_text, "available_bytes", lambda: 1000)
    with pytest.raises(UserError, match="as a whole"):
        write(model, tmp_path / "a.jsonl")


def test_rows_are_no_longer_than_the_context(model, tmp_path, capsys):
    write(model, tmp_path / "a.jsonl", "-l", 1000, rows=1)
    assert "Rows of 64 tokens" in capsys.readouterr().out
