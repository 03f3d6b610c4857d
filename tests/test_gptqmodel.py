"""Our layers, decoded by somebody else: GPT-QModel's decoder in plain torch.

Its file alone is taken out of the package's source archive, in the version that was read, and runs
with stand-ins for the little it imports. Fetched once by pip into the cache; where that cannot be
done the tests skip.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from jobs_helpers import flags, run
from test_moe_convert import save_small
from tiny_models import save_tokenizer

import exl3
from exl3.format.codebook import CODEBOOKS
from exl3.format.layer import decode_layer
from exl3.model.checkpoint import Checkpoint

VERSION = "7.7.0"
FILE = f"gptqmodel-{VERSION}/gptqmodel/nn_modules/exllamav3_torch.py"
SHA256 = "d704357157c1266d20b60aee7853c4398697df0f556ea2078f077a79dd4fff79"  # of the file
SECONDS = 120  # that the fetching may take
NEAR = 3e-4  # it leaves out one rounding to half precision
BUFFERS = ("trellis", "suh", "svh", "su", "sv", "bias", "mcg", "mul1")

PACKAGE = "their_package"  # a name of our own: the real one may be installed
STAND_INS = {
    "utils.cpu_features": {"has_avx512_bf16": lambda: False},
    "utils.env": {"env_flag": lambda name, default=False: default},
    "utils.logger": {"setup_logger": lambda: SimpleNamespace()},
    "utils.torch": {"TORCH_HAS_COMPILE": False, "torch_compile": None},
    "nn_modules.exllamav3": {"_EXL3_BUFFER_NAMES": BUFFERS, "_torch_dtype": None},
}


def cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "exl3" / "tests"


def fetch(folder: Path) -> Path:
    """The package's source archive in this folder, or the test skips."""
    archive = folder / f"gptqmodel-{VERSION}.tar.gz"
    if archive.exists():
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", f"gptqmodel=={VERSION}", "--quiet"]
    command += ["--no-deps", "--no-binary", ":all:", "--dest", str(folder), "--retries", "1"]
    try:
        subprocess.run(command, check=True, timeout=SECONDS, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        pytest.skip(f"gptqmodel {VERSION} could not be fetched within {SECONDS} seconds")
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        pytest.skip(f"gptqmodel {VERSION} could not be fetched: {lines[-1] if lines else error}")
    return archive


def load(archive: Path, name: str) -> ModuleType:
    """The one file of the archive, as a module of this name; nothing else of it runs."""
    with tarfile.open(archive) as files:
        source = files.extractfile(FILE).read()
    assert hashlib.sha256(source).hexdigest() == SHA256, f"{archive} holds another {FILE}"
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, None))
    exec(compile(source, FILE, "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def theirs():
    """Their class of a layer."""
    archive = fetch(cache())
    with pytest.MonkeyPatch.context() as patch:
        for name in (PACKAGE, f"{PACKAGE}.utils", f"{PACKAGE}.nn_modules"):
            package = ModuleType(name)
            package.__path__ = []
            patch.setitem(sys.modules, name, package)
        for name, content in STAND_INS.items():
            stand_in = ModuleType(f"{PACKAGE}.{name}")
            vars(stand_in).update(content)
            patch.setitem(sys.modules, stand_in.__name__, stand_in)
        yield load(archive, f"{PACKAGE}.nn_modules.exllamav3_torch").ExllamaV3TorchLinear


def decoded_by(theirs, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A layer's weight (in, out) as they see it."""
    rows, columns = (16 * n for n in tensors["trellis"].shape[:2])
    layer = theirs.from_tensors(
        in_features=rows, out_features=columns, name="layer", tensors=tensors
    )
    return layer.get_weight_tensor(torch.float32)


def apart(ours: torch.Tensor, other: torch.Tensor) -> float:
    return float((ours - other).norm() / ours.norm())


@pytest.mark.slow
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_they_decode_our_layers(theirs, codebook, bits):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(128, 256, generator=generator) * 0.02
    inputs = torch.randn(512, 128, generator=generator)
    tensors = exl3.quantize_linear(weight, inputs.T @ inputs / 512, bits, codebook).tensors
    found = decoded_by(theirs, tensors)
    assert apart(decode_layer(tensors), found) < NEAR
    assert apart(weight, found) < 0.8 * 0.55 ** (bits - 1)  # and it is this layer's


@pytest.mark.slow
def test_a_code_changed_is_noticed(theirs):
    """The bound is near enough to see a single wrong code."""
    tensors = exl3.quantize_linear(torch.randn(128, 128), None, 4).tensors
    changed = {**tensors, "trellis": tensors["trellis"].clone()}
    changed["trellis"][3, 5, 7] ^= 1 << 9
    assert apart(decode_layer(tensors), decoded_by(theirs, changed)) > 10 * NEAR


@pytest.mark.slow
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_they_decode_the_layers_of_a_mixtral(theirs, tmp_path, codebook):
    model, out = tmp_path / "model", tmp_path / "quant"
    save_small("mixtral", model)
    save_tokenizer(model)
    job = flags(model, out, tmp_path / "work", "3", **{"-cr": 3, "-cc": 32, "-cb": codebook})
    run(*job, "--uniform")
    source, quant = Checkpoint(model), Checkpoint(out)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key in quant.keys():  # noqa: SIM118
        name, _, leaf = key.rpartition(".")
        if leaf in BUFFERS:
            layers.setdefault(name, {})[leaf] = quant.tensor(key)
    experts = [name for name in layers if ".experts." in name]
    assert len(experts) == 9
    for name, tensors in layers.items():
        found = decoded_by(theirs, tensors)
        assert apart(decode_layer(tensors), found) < NEAR, name
        weight = source.tensor(f"{name}.weight").float().T
        assert apart(weight, found[: weight.shape[0], : weight.shape[1]]) < 0.4, name
