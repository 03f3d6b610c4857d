"""Whatever transformers loads, whole and with its own code; EXL3 quants decoded beforehand.

Nothing of our streaming runs here, so this engine can check it.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from exl3.errors import UserError
from exl3.evaluate.engines.base import Engine
from exl3.evaluate.engines.place import Place
from exl3.model.experts import restack
from exl3.model.quantized import open_model
from exl3.progress import Progress, no_transformers_bar

# What EXL3 stores apart, but some models of transformers as one.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class TransformersEngine(Engine):
    """A stock model: float16 on a GPU, as users of these names know it, float32 on a CPU.

    bfloat16: that instead, everywhere. spread: over all GPUs, where accelerate is installed.
    """

    def __init__(
        self,
        place: Place,
        device: torch.device,
        trust_remote_code: bool,
        bfloat16: bool = False,
        spread: bool = False,
    ) -> None:
        super().__init__(place)
        on_cpu = device.type == "cpu"
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32 if on_cpu else torch.float16
        self.device, self.trust = device, trust_remote_code
        self.map = "auto" if spread and not on_cpu and find_spec("accelerate") else None
        self.arithmetic = f"transformers, {str(self.dtype).removeprefix('torch.')}"
        self.config = self._said(AutoConfig.from_pretrained)
        text = self.config.get_text_config(decoder=True)
        self.vocab = text.vocab_size
        self.context = getattr(text, "max_position_embeddings", None)
        self._model: PreTrainedModel | None = None

    def logits(
        self, rows: torch.Tensor, indices: Sequence[int], progress: Progress | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        model = self.model(progress)
        device = model.get_input_embeddings().weight.device
        for index in indices:
            ids = rows[index : index + 1].to(device)
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            if progress is not None:
                progress.advance(1)
            yield index, logits

    def model(self, progress: Progress | None = None) -> PreTrainedModel:
        """The model, loaded when it is first asked for."""
        if self._model is None:
            if progress is not None:
                progress.doing("loading")
            self._model = self._load()
        return self._model

    def close(self) -> None:
        self._model = None
        super().close()

    def _load(self) -> PreTrainedModel:
        with no_transformers_bar():
            if self.place.is_exl3:
                return load_decoded(self.place.path, self.dtype, self.trust).to(self.device)
            model, info = self._said(
                AutoModelForCausalLM.from_pretrained,
                dtype=self.dtype,
                device_map=self.map,
                output_loading_info=True,
            )
        _refuse_missing(info, self.place.name)
        return (model if self.map else model.to(self.device)).eval()

    def _said(self, load: object, **more: object) -> object:
        """What transformers loads; a UserError with what it says if it cannot."""
        try:
            return load(
                str(self.place.path),
                local_files_only=True,
                trust_remote_code=self.trust,
                **more,
            )
        except Exception as error:  # of any library a quantized model wants
            text = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"{self.place.name}: transformers cannot load it: {text}") from error


def load_decoded(
    folder: Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """An EXL3 model as a stock model with the weights that its layers decode to.

    UserError for a damaged folder or a model that cannot be EXL3.
    """
    streamed = open_model(folder, trust_remote_code)  # no weights yet: it knows the padding
    config = AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )
    del config.quantization_config
    if not streamed.tied_head:  # the head has codes of its own, whatever its original was
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    source = streamed.checkpoint
    state = {key: source.tensor(key).to(dtype) for key in source.keys()}  # noqa: SIM118
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model, info = type(skeleton).from_pretrained(
        None,
        config=config,
        state_dict=restack(_fused(state, skeleton), skeleton),
        dtype=dtype,
        output_loading_info=True,
    )
    _refuse_missing(info, str(folder))
    return model.eval()


def _fused(state: dict[str, torch.Tensor], skeleton: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state with parts joined where the model has one linear for them."""
    leaves = {name.rpartition(".")[2] for name, _ in skeleton.named_modules()}
    for fused, parts in FUSED.items():
        if fused not in leaves:
            continue
        for key in list(state):
            before, first, leaf = key.rpartition(f".{parts[0]}.")
            if first:
                tensors = [state.pop(f"{before}.{part}.{leaf}") for part in parts]
                state[f"{before}.{fused}.{leaf}"] = torch.cat(tensors)
    return state


def _refuse_missing(info: dict[str, object], name: str) -> None:
    """UserError if transformers made up weights that are in no file."""
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name}: {missing[0]} is in no file; download the model again")
