"""Every flag of convert.py, in every spelling that users know: what it is taken for."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from exl3.errors import UserError
from exl3.jobs.flags import IGNORED, convert_parser
from exl3.jobs.settings import (
    Settings,
    forget_job,
    load_settings,
    read_request,
    save_settings,
)

DOCS = Path(__file__).resolve().parents[1] / "docs" / "convert.md"


@pytest.fixture
def model(tmp_path):
    """A folder is all that the command line wants to see."""
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def understood(*arguments):
    return read_request(convert_parser().parse_args([str(a) for a in arguments]))


@pytest.fixture
def base(model, tmp_path):
    return ("-i", model, "-o", tmp_path / "out", "-w", tmp_path / "work", "-b", "3")


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--head_bits", "8"], "head_bits", 8),
        (["-hb", "16"], "head_bits", 16),
        (["-ss", "0"], "shard_size", 0),
        (["--out_scales"], "out_scales", "always"),
        (["--out_scales", "auto"], "out_scales", "auto"),
        (["--out_scales", "never"], "out_scales", "never"),
        (["--no_out_scales"], "out_scales", "never"),
        (["-hq"], "hq", True),
        (["-cr", "5"], "cal_rows", 5),
        (["-rows", "5"], "cal_rows", 5),
        (["--dataset_rows", "5"], "cal_rows", 5),
        (["-cc", "99"], "cal_cols", 99),
        (["-l", "99"], "cal_cols", 99),
        (["--length", "99"], "cal_cols", 99),
        (["--cal_stride", "7"], "cal_stride", 7),
        (["-c", "owner/name:config"], "cal_file", "owner/name:config"),
        (["--cal_dataset", "wikitext"], "cal_file", "wikitext"),
        (["--cal_split", "test"], "cal_split", "test"),
        (["-cb", "mcg"], "codebook", "mcg"),
        (["-mcg", "0xCBAC1FED"], "codebook", "mcg"),
        (["-mul1", "0x83DCD12D"], "codebook", "mul1"),
        (["-ra", "2.5"], "rope_alpha", 2.5),
        (["--rope_scale", "4"], "rope_scale", 4.0),
        (["-cpi", "0"], "checkpoint_interval", 0),
        (["-d", "0,1"], "devices", "0,1"),
        (["-v"], "verbose", True),
        (["--seed", "9"], "seed", 9),
        (["--check_rows", "0"], "check_rows", 0),
        (["--no_correction"], "no_correction", True),
        (["--hessian", "input"], "hessian", "input"),
        (["--hessian_rows", "3"], "hessian_rows", 3),
        (["--max_memory", "1.5"], "max_memory", 1.5),
        (["--trust_remote_code"], "trust_remote_code", True),
    ],
)
def test_flags_in_all_spellings(base, arguments, field, value):
    assert getattr(understood(*base, *arguments).settings, field) == value


@pytest.mark.parametrize("spelling", ["-r", "-resume", "--resume"])
def test_resume_restores_every_setting(base, tmp_path, spelling):
    first = understood(*base, "-hb", "7", "-cr", "11", "--seed", "3", "-cb", "mcg").settings
    again = understood("-w", tmp_path / "work", spelling)
    assert again.settings == first


@pytest.mark.parametrize("row", IGNORED, ids=lambda row: row[1])
def test_flags_without_meaning_are_said_in_one_line(base, row):
    for name in filter(None, row[:2]):
        notes = understood(*base, name, *["1"] * row[2]).notes
        assert [note for note in notes if row[3] in note] == [
            f"{row[0] or row[1]} is ignored: {row[3]}"
        ]


def test_exllamav2_folders(model, tmp_path):
    request = understood("-i", model, "-o", tmp_path / "t", "-cf", tmp_path / "q", "-b", "3")
    assert request.settings.work_dir == str(tmp_path / "t")
    assert request.settings.out_dir == str(tmp_path / "q")
    assert "as in exllamav2" in request.notes[0]
    request = understood("-i", model, "-w", tmp_path / "w", "-cf", tmp_path / "q", "-b", "3")
    assert request.settings.out_dir == str(tmp_path / "q")
    with pytest.raises(UserError, match="leave one of them out"):
        understood("-i", model, "-w", "w", "-o", "o", "-cf", "q", "-b", "3")


def test_no_resume_forgets_the_job_and_nothing_else(base, tmp_path):
    understood(*base)
    work = tmp_path / "work"
    (work / "identity.json").write_text("{}")
    (work / "layers").mkdir()
    (work / "layers" / "a.safetensors").write_text("")
    (work / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="different job"):
        understood(*base[:-1], "4")
    with pytest.raises(UserError, match="missing"):  # a typo costs nothing
        understood("-w", work, "-nr")
    request = understood(*base[:-1], "4", "-nr")
    assert request.settings.bits == 4
    assert request.fresh
    assert not request.resumed
    assert (work / "layers" / "a.safetensors").exists()  # until the job has the folder's lock
    forget_job(work)
    save_settings(request.settings)
    assert sorted(p.name for p in work.rglob("*") if p.is_file()) == ["job.json", "mine.txt"]
    with pytest.raises(UserError, match="contradict"):
        understood("-w", work, "-r", "-nr")


def test_a_folder_without_a_job_is_not_emptied(tmp_path):
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "mine.safetensors").write_text("mine")
    forget_job(tmp_path)
    assert (tmp_path / "layers" / "mine.safetensors").exists()


def test_a_work_folder_with_other_things_is_refused(model, base, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds something that is no job \(config\.json\)"):
        understood(*base)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["config.json"]


def test_ranges_come_before_other_jobs(base, tmp_path):
    understood(*base)
    (tmp_path / "work" / "identity.json").write_text("{}")
    with pytest.raises(UserError, match="-hb 9 is out of range"):
        understood(*base, "-hb", "9")
    with pytest.raises(UserError, match=r"-b was 3\.0, now 4\.0\)"):
        understood(*base[:-1], "4")


def test_contradictions_are_refused(base):
    with pytest.raises(UserError, match="contradict"):
        understood(*base, "-mcg", "0xCBAC1FED", "-cb", "mul1")
    with pytest.raises(UserError, match="contradict"):
        understood(*base, "-mcg", "0xCBAC1FED", "-mul1", "0x83DCD12D")
    with pytest.raises(SystemExit):
        understood(*base, "--out_scales", "auto", "--no_out_scales")


def test_folders_inside_each_other_are_refused(model, tmp_path):
    for out, work in (("a", "a/work"), ("w/layers", "w"), ("q", "q.exl3-partial")):
        with pytest.raises(UserError, match=r"lies inside|is put together in"):
            understood("-i", model, "-o", tmp_path / out, "-w", tmp_path / work, "-b", "3")
    assert sorted(tmp_path.iterdir()) == [model]


def test_harmless_changes_are_said(base, tmp_path):
    understood(*base)
    (tmp_path / "work" / "identity.json").write_text("{}")
    request = understood("-w", tmp_path / "work", "-r", "-ss", "100", "-o", tmp_path / "new")
    assert request.resumed
    assert request.settings.shard_size == 100
    assert [note.partition(" is now")[0] for note in request.notes] == ["-o", "-ss"]
    request = understood(*base, "-d", "cpu")
    assert "-d is now cpu (was 0)" in request.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "x.json"], "x.json does not exist; make it with util/measure.py"),
        (["-om", "x.json"], "util/measure.py does, and -m takes what it writes"),
        (["--recipe", "x.yaml"], "x.yaml does not exist"),
        (["-mcg", "0x1"], "use -cb mcg"),
        (["-mul1", "zzz"], "use -cb mul1"),
        (["-hb", "12"], "-hb 12 is out of range"),
        (["-ra", "-1"], "-ra -1.0 is out of range"),
        (["--hessian_rows", "0"], "--hessian_rows 0 is out of range"),
        (["--max_memory", "nan"], "--max_memory nan is out of range"),
        (["-ss", "-5"], "-ss -5 is out of range"),
        (["--cal_stride", "0"], "--cal_stride 0 is out of range"),
        (["-c", "missing.txt"], "-c missing.txt is no file"),
        (["-c", "no such file"], "is no file"),
        (["-d", "gpu"], "give device numbers"),
    ],
)
def test_bad_values(base, tmp_path, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        understood(*base, *arguments)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--bit", "3"], ["-b", "three"], ["-r", "100"], ["-cb", "nf4"], ["--out_scales", "x"]],
)
def test_what_argparse_refuses_ends_with_exit_code_2(base, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        understood(*base, *arguments)
    assert error.value.code == 2
    assert "Error: " in capsys.readouterr().err


def test_a_damaged_job_file_is_told(base, tmp_path):
    understood(*base)
    path = tmp_path / "work" / "job.json"
    whole = json.loads(path.read_text())
    for content in ("{", "[]", {**whole, "bits": "four"}, {**whole, "in_dir": 5}):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError, match="is damaged"):
            understood("-w", tmp_path / "work", "-r")


def test_dry_run_needs_model_and_bits_only_and_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = understood("-i", model, "-b", "3", "--dry_run")
    assert request.dry_run
    assert sorted(tmp_path.iterdir()) == [model]
    with pytest.raises(UserError, match="missing: -b"):
        understood("-i", model, "--dry_run")


def test_stored_settings_are_all_of_them(base, tmp_path):
    settings = understood(*base).settings
    stored = json.loads((tmp_path / "work" / "job.json").read_text())
    assert stored == dataclasses.asdict(settings)
    assert stored.keys() == {f.name for f in dataclasses.fields(Settings)}
    assert load_settings(tmp_path / "work") == settings


def test_every_flag_stands_in_the_docs():
    text = DOCS.read_text()
    for action in convert_parser()._actions:
        for spelling in action.option_strings:
            assert f"`{spelling}`" in text, f"{spelling} is missing in docs/convert.md"
