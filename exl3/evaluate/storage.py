"""What a model takes, measured from its files: bits per weight and sizes of decoder and head.

By the tensors' names alone, so that it works for models that nothing here can load.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from exl3.evaluate.gguf_header import gguf_parts, gguf_tensors
from exl3.evaluate.result import Storage
from exl3.format.trellis import TILE
from exl3.memory import GIB
from exl3.model.checkpoint import Checkpoint, read_json

BLOCK = re.compile(r"(^|\.)(layers|h|blocks|block|blk)\.\d+\.")
NOT_TEXT = re.compile(r"vision|visual|audio", re.IGNORECASE)
HEADS = ("lm_head", "embed_out", "output")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "token_embd")  # heads when tied


@dataclass(frozen=True)
class Matrix:
    """A module of the model that holds a matrix, quantized or not."""

    name: str
    weights: float  # NaN where the files do not tell
    nbytes: int


def measure_storage(path: str | Path) -> Storage:
    """Bits per weight and sizes of a folder with safetensors, or of a GGUF file.

    Decoder: the matrices of the blocks (no norms, no embeddings). Of a quantized layer all that is
    stored for it counts, scales and bias too, over its weights with their padding; of a plain one
    the weight alone. A head that is tied is the embedding. Numbers are NaN where the files do not
    tell them: bits per weight of packings other than EXL3, GPTQ, AWQ, compressed-tensors and
    bitsandbytes, and all but the bytes of folders without safetensors. Bytes of the directory are
    those of the files in it, folders inside apart. UserError for damaged files.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        files = gguf_parts(path)
        matrices = _gguf_matrices(path)
    else:
        files = [file for file in path.iterdir() if file.is_file()]
        if not any(file.suffix == ".safetensors" for file in files):
            return Storage(*[math.nan] * 4, directory_bytes=_bytes(files))
        matrices = _matrices(path)
    text = [m for m in matrices if not NOT_TEXT.search(m.name)]
    decoder = [m for m in text if BLOCK.search(f"{m.name}.")]
    head = _head(text)
    return Storage(
        layer_bpw=_bpw(decoder),
        head_bpw=_bpw(head),
        layer_gib=sum(m.nbytes for m in decoder) / GIB,
        head_gib=sum(m.nbytes for m in head) / GIB if head else math.nan,
        directory_bytes=_bytes(files),
    )


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _bpw(matrices: list[Matrix]) -> float:
    weights = sum(m.weights for m in matrices)
    return 8 * sum(m.nbytes for m in matrices) / weights if weights else math.nan


def _head(matrices: list[Matrix]) -> list[Matrix]:
    """The head alone, the embedding it is tied to, or nothing."""
    outside = [m for m in matrices if not BLOCK.search(f"{m.name}.")]
    for names in (HEADS, EMBEDDINGS):
        for matrix in outside:
            if matrix.name.rpartition(".")[2] in names:
                return [matrix]
    return []


def _gguf_matrices(path: Path) -> list[Matrix]:
    return [
        Matrix(tensor.name.removesuffix(".weight"), tensor.weights, tensor.nbytes)
        for tensor in gguf_tensors(path)
        if len(tensor.shape) > 1 and tensor.name.endswith(".weight")
    ]


# -- Safetensors ---------------------------------------------------------------------------------


def _matrices(folder: Path) -> list[Matrix]:
    tensors = Checkpoint(folder)
    modules: dict[str, dict[str, str]] = {}  # module → leaf → key
    for key in tensors.keys():  # noqa: SIM118
        name, packed, leaf = key.partition(".weight.")  # as bitsandbytes has it
        if not packed:
            name, _, leaf = key.rpartition(".")
        modules.setdefault(name, {})[leaf] = key
    bits = _packed_bits(folder)
    found = (_matrix(tensors, name, leaves, bits) for name, leaves in modules.items())
    return [matrix for matrix in found if matrix is not None]


def _packed_bits(folder: Path) -> float:
    """Bits of a GPTQ or AWQ model, as its config says."""
    config = folder / "config.json"
    method = read_json(config).get("quantization_config") if config.is_file() else None
    bits = method.get("bits") if isinstance(method, dict) else None
    return bits if type(bits) is int and 1 <= bits <= 16 else math.nan


def _matrix(tensors: Checkpoint, name: str, leaves: dict[str, str], bits: float) -> Matrix | None:
    """The matrix that a module's tensors are, if they are one."""
    shapes = {leaf: tensors.shape(key) for leaf, key in leaves.items()}
    numbers = {leaf: math.prod(shape) for leaf, shape in shapes.items()}
    large = [leaf for leaf, shape in shapes.items() if len(shape) > 1]
    if not large:
        return None
    everything = sum(map(tensors.nbytes, leaves.values()))
    if "trellis" in leaves:
        rows, columns = shapes["trellis"][:2]
        return Matrix(name, rows * columns * TILE**2, everything)
    if "qweight" in leaves:  # 32-bit words full of codes
        return Matrix(name, numbers["qweight"] * 32 / bits, everything)
    if "weight_shape" in leaves:
        shape = tensors.tensor(leaves["weight_shape"]).tolist()
        return Matrix(name, math.prod(shape), everything)
    if any(leaf.startswith("quant_state.bitsandbytes__") for leaf in leaves):  # two codes a byte
        return Matrix(name, 2 * numbers["weight"], everything)
    if not all(tensors.dtype(leaves[leaf]).is_floating_point for leaf in large):
        return Matrix(name, math.nan, everything)
    if "weight" in leaves:  # with its scales, where it is float8
        bias = tensors.nbytes(leaves["bias"]) if "bias" in leaves else 0
        return Matrix(name, numbers["weight"], everything - bias)
    parts = sum(tensors.nbytes(leaves[leaf]) for leaf in large)  # experts in one tensor
    return Matrix(name, sum(numbers[leaf] for leaf in large), parts)
