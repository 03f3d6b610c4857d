"""A model's tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from exl3.errors import UserError


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; no network, and its own code only where it is trusted."""
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the files are a stranger's: anything may come
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the tokenizer of {folder} cannot be loaded: {reason}") from error
