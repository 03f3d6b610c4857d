"""What is known of one model after a comparison, in the units that model cards use."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Storage:
    """What a model takes, measured from the bytes of its files."""

    layer_bpw: float  # bits a weight of the decoder's linear layers, scales included
    head_bpw: float  # of the output head
    layer_gib: float  # GiB of the decoder's linear layers
    head_gib: float  # GiB of the head
    directory_bytes: int  # of all files of the model


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from the reference's; over all positions of all rows."""

    mean: float  # KL(reference || model), nats a token
    ci95: float  # half the width of the mean's 95% confidence interval
    median: float
    p90: float
    p99: float
    reversed: float  # mean of KL(model || reference)
    agreement: tuple[float, float, float, float, float]  # the 1 to 5 likeliest tokens are the same


@dataclass(frozen=True)
class Result:
    """One model of a comparison."""

    label: str
    group: str
    storage: Storage
    ppl: float
    ppl_error: float  # standard error
    rows: int
    divergence: Divergence | None = None  # None without reference logits
    color: str | None = None
    details: dict[str, object] = field(default_factory=dict)  # engine, folder, hashes

    @property
    def vram_gb(self) -> float:
        """GiB of decoder and head together, under the name that users' tables have."""
        return self.storage.layer_gib + self.storage.head_gib

    def as_json(self) -> dict[str, object]:
        """The keys that users' files know, and ours beside them."""
        known = {
            "label": self.label,
            "layer_bpw": self.storage.layer_bpw,
            "head_bpw": self.storage.head_bpw,
            "vram_gb": self.vram_gb,
            "ppl": self.ppl,
            "kld": None if self.divergence is None else self.divergence.mean,
        }
        ours = {k: v for k, v in asdict(self).items() if k not in known}
        return known | ours
