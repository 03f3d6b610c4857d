"""How much memory there is, and tensors that live in files."""

import mmap

import psutil
import pytest
import torch

from exl3 import memory
from exl3.memory import Spill, available_bytes, resident_now


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Sets what the control group of a container allows and uses."""

    def write(limit, used):
        (tmp_path / "limit").write_text(f"{limit}\n")
        (tmp_path / "used").write_text(f"{used}\n")
        paths = (str(tmp_path / "limit"), str(tmp_path / "used"))
        monkeypatch.setattr(memory, "GROUPS", (("/no/such/limit", "/no/such/use"), paths))

    return write


def test_a_container_may_have_less_than_the_machine(group):
    group(5000, 2000)
    assert available_bytes() == 3000
    group(5000, 6000)
    assert available_bytes() == 0


def test_a_container_without_a_limit(group):
    for limit in ("max", 2**62):
        group(limit, 1000)
        free = psutil.virtual_memory().available
        assert 0.5 * free < available_bytes() < 2 * free


def test_what_the_process_holds():
    before = resident_now()
    with mmap.mmap(-1, 64 * 2**20) as held:  # new pages, where tensors may get what others left
        held.write(bytes(len(held)))
        assert resident_now() - before > 0.8 * len(held)


def test_spilled_tensors_are_files_without_a_name(tmp_path):
    spill = Spill(tmp_path / "folder")
    a, b = spill.empty(3, 5, 7), spill.empty(4, 2, dtype=torch.int64)
    assert list((tmp_path / "folder").iterdir()) == []
    assert a.shape == (3, 5, 7)
    assert a.dtype == torch.float32
    assert b.dtype == torch.int64
    a.fill_(2.5)
    b.copy_(torch.arange(8).view(4, 2))
    assert (a == 2.5).all()
    assert torch.equal(b.flatten(), torch.arange(8))
    held = a[1]
    del a, spill
    assert (held == 2.5).all()
