"""Tables and files of a comparison's results."""

import csv
import json
import math

from evaluate_results import ORIGINAL, TWELVE, result

from exl3.evaluate.report import COLUMNS, write_csv, write_json, write_markdown
from exl3.evaluate.table import markdown_table, print_table, result_table

KNOWN = ["label", "layer_bpw", "head_bpw", "vram_gb", "ppl", "kld"]


def test_a_text_table_is_aligned_and_complete(capsys):
    print_table([ORIGINAL, *TWELVE, result("no KLD", kld=None)])
    header, rule, *lines = capsys.readouterr().out.splitlines()
    names = ("label", "bpw", "head", "GiB", "ppl", "KLD", "median", "p90", "p99", "reverse")
    assert header.split() == [*names, "top-1", "top-5"]
    assert {len(line) for line in lines[:14]} == {len(rule)} == {len(header)}
    assert lines[0].split()[:2] == ["FP16", "[reference]"]
    assert "8.454 ±0.050" in lines[13] and lines[13].endswith("-      -      -")
    assert "95.0%  60.0%" in lines[1]


def test_a_text_table_fits_a_terminal():
    tiny = result("x", ppl=12345.678, kld=0.0000123)
    long = result("an-organisation/a-model-with-a-long-name-4.00bpw-h6-exl3", bpw=16, kld=12.3)
    table = result_table([tiny, long, result("EXL3 4.00 bpw", ppl=math.inf)])
    assert max(map(len, table.splitlines())) <= 120
    assert long.label in table.splitlines()
    assert "0.000012 ±0.000000" in table and "inf ±0.050" in table


def test_a_table_of_nothing():
    assert result_table([]).startswith("label") and markdown_table([]).count("\n") == 1


def test_markdown_is_that_of_model_cards():
    card = result("anything", size=round(108.087 * 2**30))
    header, rule, line = markdown_table([card]).splitlines()
    assert header == "| Quant | Size | KLD | PPL |"
    assert set(rule) <= set("|:-")
    assert line == "| 4.00 bpw h6 | 108.087 GiB | 0.0788 | 8.454 |"


def test_markdown_tells_models_apart(tmp_path):
    results = [ORIGINAL, *TWELVE[:2], TWELVE[8], result("no | KLD", kld=None, size=2**20)]
    write_markdown(tmp_path / "card.md", results)
    lines = (tmp_path / "card.md").read_text().splitlines()[2:]
    names = [line.split(" | ")[0] for line in lines]
    assert names[:4] == [
        "| FP16",
        "| EXL3 2.26 bpw h6",
        "| EXL3 3.01 bpw h6",
        "| GGUF Q3_K_S 3.44 bpw h6",
    ]
    assert lines[4] == "| no \\| KLD 4.00 bpw h6 | 1.000 MiB | - | 8.454 |"
    twins = [result("EXL3 old"), result("EXL3 new [mul1]")]
    assert "| EXL3 new [mul1], 4.00 bpw h6 |" in markdown_table(twins)


def test_small_divergences_keep_their_digits():
    assert "| 0.00023 |" in markdown_table([result("x", kld=0.00023)])


def test_json_has_the_keys_that_users_know(tmp_path):
    broken = result("broken", ppl=math.nan, kld=math.inf, details={"hashes": ["a"]})
    write_json(tmp_path / "out.json", [*TWELVE, result("no KLD", kld=None), broken])
    text = (tmp_path / "out.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    objects = json.loads(text)
    assert [o["label"] for o in objects[:2]] == ["EXL3 2.26 bpw h6", "EXL3 3.01 bpw h6"]
    assert all(list(o)[:6] == KNOWN for o in objects)
    assert objects[0]["kld"] == TWELVE[0].divergence.mean
    assert objects[12]["kld"] is None and objects[12]["divergence"] is None
    assert objects[13]["ppl"] is None and objects[13]["details"] == {"hashes": ["a"]}


def test_csv_has_the_same_columns_always(tmp_path):
    write_csv(tmp_path / "out.csv", [TWELVE[0], result('a "b", c', kld=None, ppl=math.nan)])
    with open(tmp_path / "out.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(COLUMNS)
    assert float(lines[0]["kld"]) == TWELVE[0].divergence.mean
    assert float(lines[0]["top5"]) == 0.6
    assert lines[1]["label"] == 'a "b", c' and lines[1]["kld"] == lines[1]["ppl"] == ""
