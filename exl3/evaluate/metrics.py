"""How far a model's predictions are from the reference's. Formulas on logits; no model here.

Of every row the numbers of all its positions are kept, small enough for a file, and summed up when
all rows are known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from exl3 import parallel
from exl3.errors import UserError
from exl3.evaluate.result import Divergence

TOP = 5  # of so many likeliest tokens the agreement is told
CHUNK = 1 << 20  # logits in work at a time: a few MB each copy, which the caches hold
CONFIDENCE = 0.95

Row = dict[str, torch.Tensor]  # what `row_metrics` returns


# -- One row -------------------------------------------------------------------------------------


def row_metrics(
    logits: torch.Tensor, ids: torch.Tensor, reference: torch.Tensor | None = None
) -> Row:
    """What every position of a row tells of a model; on the CPU.

    logits: (1, length, vocab), any float dtype and device; ids: (1, length); reference: logits of
    the model to compare with. Returns

    - `nll`, float64 (length - 1): -log p of the token that follows, in nats;

    and with a reference
    - `kld`, `kld_reversed`, float64 (length,): KL(reference || model) and KL(model || reference);
    - `agreement`, bool (5, length): row k-1 tells whether the k likeliest tokens are the same, in
      the same order; of equally likely tokens the one with the lower id comes first.

    A token that both models exclude (-inf) counts nothing; NaN stays NaN. UserError if reference
    or ids do not belong to the logits.
    """
    _check(logits, ids, reference)
    length, vocab = logits.shape[1:]
    step = max(1, CHUNK // vocab)
    following = ids[0, 1:].to(logits.device)

    def chunk(begin: int) -> Row:
        part = slice(begin, begin + step)
        expected = None if reference is None else reference[0, part].to(logits.device)
        return _metrics(logits[0, part], following[part], expected)

    with parallel.one_thread_per_op(), parallel.work_on(logits.device):
        chunks = parallel.each(chunk, range(0, length, step))
    return {name: torch.cat([c[name] for c in chunks], -1).cpu() for name in chunks[0]}


@torch.no_grad()
def row_kld(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The `kld` of `row_metrics` alone, at half its cost or less: KL(reference || model) of every
    position, float64 (length,), on the CPU. Both logits: (1, length, vocab); UserError if they do
    not belong together."""
    _check_reference(logits, reference)
    length, vocab = logits.shape[1:]
    step = max(1, CHUNK // vocab)

    def chunk(begin: int) -> torch.Tensor:
        part = slice(begin, begin + step)
        expected, got = (
            torch.log_softmax(x[0, part].to(logits.device).float(), -1) for x in (reference, logits)
        )
        return _kl(expected.exp(), got.exp(), expected - got)

    with parallel.one_thread_per_op(), parallel.work_on(logits.device):
        return torch.cat(parallel.each(chunk, range(0, length, step))).cpu()


def _check(logits: torch.Tensor, ids: torch.Tensor, reference: torch.Tensor | None) -> None:
    if logits.shape[:2] != ids.shape or len(ids) != 1:
        raise ValueError(f"logits {tuple(logits.shape)} for ids {tuple(ids.shape)}")
    vocab = logits.shape[-1]
    if ids.max() >= vocab:
        raise UserError(
            f"the rows hold the token {int(ids.max())}, but the model knows only {vocab:,}; use "
            "the tokenizer that belongs to the model"
        )
    if reference is not None:
        _check_reference(logits, reference)


def _check_reference(logits: torch.Tensor, reference: torch.Tensor) -> None:
    vocab = logits.shape[-1]
    if reference.shape == logits.shape:
        return
    if reference.shape[:2] == logits.shape[:2]:
        raise UserError(
            f"the reference predicts {reference.shape[-1]:,} tokens, the model {vocab:,}; they can "
            "only be compared if they have the same vocabulary"
        )
    raise UserError(
        f"the reference's logits are for a row of {reference.shape[1]} tokens, not of "
        f"{logits.shape[1]}; make them again with this dataset"
    )


@torch.no_grad()
def _metrics(logits: torch.Tensor, following: torch.Tensor, reference: torch.Tensor | None) -> Row:
    """`row_metrics` of some positions: logits (n, vocab), following (n,) or, at the end, (n-1,)."""
    logits = logits.float()
    got = torch.log_softmax(logits, -1)
    nll = -got[: len(following)].gather(-1, following[:, None])[:, 0].double()
    if reference is None:
        return {"nll": nll}
    reference = reference.float()
    expected = torch.log_softmax(reference, -1)
    p, q, log_ratio = expected.exp(), got.exp(), expected - got
    kld, kld_reversed = _kl(p, q, log_ratio), _kl(q, p, -log_ratio)
    agreement = _agreement(likeliest(reference), likeliest(logits))
    return {"nll": nll, "kld": kld, "kld_reversed": kld_reversed, "agreement": agreement}


def _kl(p: torch.Tensor, q: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """KL(p || q), float64 (n,), of probabilities and log(p / q), (n, vocab).

    The sum of p log(p/q) + q - p: that is the same, as p and q both sum to 1, but no term is
    negative, so the rounding of the normalization cancels instead of drowning small divergences.
    """
    # 0 log 0 = 0, and also where a probability is too small for float32.
    terms = (p * log_ratio).masked_fill_(p == 0, 0).add_(q - p)
    return terms.sum(-1, dtype=torch.float64)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Ids of the 5 largest logits (n, vocab), (n, 5); of equal ones the lower id comes first.

    A vocabulary of fewer tokens gives as many as it has.
    """
    vocab = logits.shape[-1]
    values, ids = logits.topk(min(TOP + 1, vocab))
    ids = ids[:, :TOP]
    tied = (values[:, 1:] == values[:, :-1]).any(-1)  # there topk promises no order
    rest = logits[tied]
    for k in range(ids.shape[1]):
        best = rest.argmax(-1, keepdim=True)  # the first of equals
        ids[tied, k] = best[:, 0]
        rest.scatter_(-1, best, -math.inf)
    return ids


def _agreement(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether the first 1 to 5 ids (n, up to 5) are the same: bool (5, n)."""
    same = (a == b).cumprod(-1).bool().T
    return torch.cat([same, same[-1:].expand(TOP - len(same), -1)])


# -- All rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What all rows together tell; all positions of all rows count."""

    ppl: float
    ppl_error: float  # standard error
    rows: int
    divergence: Divergence | None  # of the rows that have a reference; None if there is none
    reference_rows: int  # how many those are


def summarize(rows: Sequence[Row]) -> Summary:
    """Perplexity of all rows, and divergence of those measured against a reference."""
    mean, error, _ = mean_and_error([row["nll"] for row in rows])
    ppl = _exp(mean)
    compared = [row for row in rows if "kld" in row]
    divergence = _divergence(compared) if compared else None
    # Delta method: exp(mean ± error) is, to first order, exp(mean) ± exp(mean) error.
    return Summary(ppl, ppl * error, len(rows), divergence, len(compared))


def _divergence(rows: Sequence[Row]) -> Divergence:
    mean, error, freedom = mean_and_error([row["kld"] for row in rows])
    kld = torch.cat([row["kld"] for row in rows]).numpy()
    with np.errstate(invalid="ignore"):  # between infinite values
        median, p90, p99 = map(float, np.quantile(kld, (0.5, 0.9, 0.99)))
    return Divergence(
        mean=mean,
        ci95=student_t(freedom) * error,
        median=median,
        p90=p90,
        p99=p99,
        reversed=float(torch.cat([row["kld_reversed"] for row in rows]).double().mean()),
        agreement=tuple(torch.cat([row["agreement"] for row in rows], 1).double().mean(1).tolist()),
    )


def mean_and_error(rows: Sequence[torch.Tensor]) -> tuple[float, float, int]:
    """Mean over all tokens, its standard error, and the error's degrees of freedom.

    Rows are the sample: the tokens of a row resemble each other, so counting them as independent
    makes errors too small. A single row leaves nothing else; there the error is a lower bound.
    NaN is the error of a single token.
    """
    if len(rows) > 1:
        sums = torch.stack([row.double().sum() for row in rows])
        counts = torch.tensor([len(row) for row in rows], dtype=torch.float64)
    else:
        sums, counts = rows[0].double(), torch.ones(len(rows[0]), dtype=torch.float64)
    n = len(sums)
    mean = sums.sum() / counts.sum()
    if n < 2:
        return float(mean), math.nan, 0
    # The mean is a ratio of two sums, of which the rows' deviations from it are the errors.
    variance = ((sums - mean * counts) ** 2).sum() * n / (n - 1)
    return float(mean), float(variance.sqrt() / counts.sum()), n - 1


def student_t(freedom: int) -> float:
    """Half the width of the 95% confidence interval, in standard errors."""
    if freedom < 1:
        return math.nan
    if freedom == 1:
        return math.tan(math.pi / 2 * CONFIDENCE)
    if freedom == 2:
        return CONFIDENCE * math.sqrt(2 / (1 - CONFIDENCE**2))
    # Expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), within 0.1% from 3 on.
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**k for k, term in enumerate(terms))


def _exp(mean: float) -> float:
    return math.inf if mean > 700 else math.exp(mean)  # NaN stays NaN


# -- Sums only -----------------------------------------------------------------------------------


@dataclass
class Scores:
    """Sums over the positions of one model against the reference, where nothing more is asked."""

    kld_sum: float = 0.0  # nats
    agreed: int = 0  # positions with the same most likely token
    positions: int = 0
    nll_sum: float = 0.0  # nats, of the tokens that follow
    tokens: int = 0

    def add(self, reference: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Adds rows: both logits (rows, cols, vocab), ids (rows, cols)."""
        for row in range(len(ids)):
            part = slice(row, row + 1)
            found = row_metrics(logits[part], ids[part], reference[part])
            self.kld_sum += found["kld"].sum().item()
            self.agreed += int(found["agreement"][0].sum())
            self.positions += found["kld"].numel()
            self.nll_sum += found["nll"].sum().item()
            self.tokens += found["nll"].numel()

    @property
    def kld(self) -> float:
        """Mean KL divergence D(reference || model) a position, in nats."""
        return self.kld_sum / self.positions

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of every token given those before it."""
        return _exp(self.nll_sum / self.tokens)

    @property
    def top1(self) -> float:
        """Share of positions where both models find the same token most likely."""
        return self.agreed / self.positions
