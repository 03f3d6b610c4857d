"""Moments of two streams, targets that make up for earlier errors, Hessians of few tokens."""

import pytest
import torch

import exl3
from exl3 import parallel
from exl3.errors import JobError
from exl3.quant.correction import Correction, Moments, corrected_weight, shrink, trust
from exl3.quant.hessian import Hessian, cholesky_
from exl3.quant.linear import weight_error

IN, OUT, TOKENS = 96, 40, 3000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed):
    return torch.randn(*shape, generator=generator(seed))


def streams():
    """xf (tokens, in) of the original, xq of a model whose earlier layers lost something."""
    xf = random(TOKENS, IN, seed=1) @ (random(IN, IN, seed=2) * 0.3)
    loss = torch.eye(IN) + random(IN, IN, seed=3) * 0.03
    return xf, xf @ loss + random(TOKENS, IN, seed=4) * 0.1


def moments_of(xq, xf, residual=None, weights=None):
    moments = Moments(xq.shape[1], None if residual is None else residual.shape[1])
    for part in torch.arange(len(xq)).split(700):
        moments.add(
            xq[part],
            xf[part],
            None if residual is None else residual[part],
            None if weights is None else weights[part],
        )
    return moments


def means(moments):
    return moments.hessian.mean(), moments.shift(), moments.residual()


def test_moments_are_means_over_tokens():
    xf, xq = streams()
    r = random(TOKENS, OUT, seed=5)
    hessian, shift, residual = means(moments_of(xq, xf, r))
    assert torch.allclose(hessian, xq.T @ xq / TOKENS, atol=1e-4)
    assert torch.allclose(shift, xq.T @ (xf - xq) / TOKENS, atol=1e-4)
    assert torch.allclose(residual, xq.T @ r / TOKENS, atol=1e-4)
    assert moments_of(xq, xf).residual() is None


def test_a_weight_counts_like_a_repeated_token():
    xf, xq = streams()
    r = random(TOKENS, OUT, seed=5)
    times = torch.arange(TOKENS) % 4
    weighted = means(moments_of(xq, xf, r, times))
    again = [x.repeat_interleave(times, 0) for x in (xq, xf, r)]
    for mean, repeated in zip(weighted, means(moments_of(*again)), strict=True):
        assert torch.allclose(mean, repeated, rtol=1e-4, atol=1e-4)


def test_residuals_come_with_all_tokens_or_none():
    xf, xq = streams()
    with pytest.raises(ValueError, match="residuals"):
        Moments(IN).add(xq, xf, random(TOKENS, OUT, seed=5))
    with pytest.raises(ValueError, match="residuals"):
        Moments(IN, OUT).add(xq, xf)


def test_no_tokens_give_zeros_and_the_weight_itself():
    moments = Moments(IN, OUT)
    w = random(IN, OUT, seed=6)
    assert not any(mean.any() for mean in means(moments))
    assert torch.equal(corrected_weight(w, *means(moments)), w)


def test_the_target_is_the_ridge_solution():
    xf, xq = streams()
    w, r = random(IN, OUT, seed=6), random(TOKENS, OUT, seed=5)
    target = corrected_weight(w, *means(moments_of(xq, xf, r)))
    x, f, w, r = xq.double(), xf.double(), w.double(), r.double()
    ridge = 0.025 * (x * x).sum() / IN
    unit = torch.eye(IN, dtype=torch.float64)
    wanted = torch.linalg.solve(x.T @ x + ridge * unit, x.T @ f @ w + x.T @ r + ridge * w)
    assert torch.allclose(target.double(), wanted, atol=1e-4)


def test_outputs_come_nearer_to_the_originals():
    """Of the unquantized layer and of the quantized one, on tokens that were not seen."""
    xf, xq = streams()
    w = random(IN, OUT, seed=6)
    seen, unseen = slice(0, 2000), slice(2000, None)
    moments = moments_of(xq[seen], xf[seen])
    target = corrected_weight(w, *means(moments))

    def error(weight):
        return float((xq[unseen] @ weight - xf[unseen] @ w).square().mean())

    assert error(target) < 0.5 * error(w)
    hessian = moments.hessian.mean()
    quantized = [exl3.quantize_linear(w, hessian, 4, target=t).weight for t in (target, None)]
    assert error(quantized[0]) < 0.7 * error(quantized[1])


def test_residuals_are_undone():
    _, xq = streams()
    w = random(IN, OUT, seed=6)
    lost = random(IN, OUT, seed=7) * 0.1
    r = xq @ lost
    target = corrected_weight(w, *means(moments_of(xq, xq, r)))
    left = r - (xq @ target - xq @ w)
    assert left.square().mean() < 0.03 * r.square().mean()


def test_strength_goes_from_the_weight_to_the_target():
    xf, xq = streams()
    w = random(IN, OUT, seed=6)
    correction = Correction(moments_of(xq, xf).hessian.mean())
    shift = moments_of(xq, xf).shift()
    none, half, full = (correction.target(w, shift, strength=s) for s in (0.0, 0.5, 1.0))
    assert torch.equal(none, w)
    assert torch.allclose(half, (w + full) / 2, atol=1e-5)
    assert not correction.notes


def test_equal_streams_ask_for_the_weight_itself():
    _, xq = streams()
    w = random(IN, OUT, seed=6)
    assert torch.equal(corrected_weight(w, *means(moments_of(xq, xq))), w)


@pytest.mark.parametrize(
    ("hessian", "note"),
    [
        (torch.zeros(IN, IN), "all-zero"),
        (torch.full((IN, IN), float("inf")), "non-finite"),
        (torch.eye(IN) + 40 * torch.eye(IN).roll(1, 0) + 40 * torch.eye(IN).roll(-1, 0), "not pos"),
    ],
)
def test_useless_hessians_leave_the_weight(hessian, note):
    w = random(IN, OUT, seed=6)
    correction = Correction(hessian)
    assert torch.equal(correction.target(w, torch.eye(IN)), w)
    assert note in correction.notes[0]


def test_non_finite_moments_leave_the_weight():
    w = random(IN, OUT, seed=6)
    correction = Correction(torch.eye(IN))
    assert torch.equal(correction.target(w, torch.full((IN, IN), float("nan"))), w)
    assert "non-finite" in correction.notes[0]


def test_indefinite_hessians_are_damped_further():
    h = torch.eye(IN) * 2
    h[0, 1] = h[1, 0] = 2.4  # smallest eigenvalue -0.4: needs a damping of 0.2 or more
    correction = Correction(h)
    target = correction.target(torch.zeros(IN, OUT), torch.eye(IN), torch.ones(IN, OUT))
    assert correction.notes == ["the correction needed a damping of 0.4"]
    assert torch.allclose(target[2:], torch.tensor(1 / 2.8))


def test_errors_are_relative_to_the_target():
    w, target = random(256, 128, seed=6), random(256, 128, seed=7)
    hessian = Hessian(256)
    hessian.add(random(1000, 256, seed=8))
    result = exl3.quantize_linear(w, hessian.mean(), 4, target=target)
    assert result.weight_error == weight_error(target, result.weight) < 0.01
    assert result.proxy_error < 0.01
    assert not result.notes  # though nothing of the weight itself is left
    same = exl3.quantize_linear(target, hessian.mean(), 4)
    assert torch.equal(same.tensors["trellis"], result.tensors["trellis"])


def test_bad_targets_are_told():
    w = random(256, 128, seed=6)
    with pytest.raises(ValueError, match="its target"):
        exl3.quantize_linear(w, None, 4, target=w.T)
    bad = w.clone()
    bad[3, 4] = float("inf")
    with pytest.raises(JobError, match=r"blk\.7\.weight: its correction .* 1 non-finite"):
        exl3.quantize_linear(w, None, 4, target=bad, name="blk.7.weight")


def test_shrinking_follows_its_rule():
    few, many = Hessian(32), Hessian(32)
    few.add(random(8, 32, seed=1) * 3)
    many.add(random(4000, 32, seed=2) @ random(32, 32, seed=3))
    h, t = few.mean(), many.mean()
    shrunk = shrink(h, few.tokens, t)
    assert shrunk.trace() == pytest.approx(float(h.trace()), rel=1e-5)
    assert torch.allclose(shrunk, 0.2 * h + 0.8 * t * h.trace() / t.trace(), rtol=1e-4, atol=1e-5)
    assert torch.equal(shrink(torch.zeros(32, 32), 0, t), t)
    assert torch.equal(shrink(h, few.tokens, torch.zeros(32, 32)), h)
    assert trust(0, 32) == 0
    assert trust(32, 32) == 0.5
    assert trust(320, 32) > 0.9


def test_shrinking_helps_a_starved_hessian():
    """A layer encoded with a Hessian of few tokens, judged by many of the same kind."""
    shared = random(256, 256, seed=1) * torch.logspace(0, -1.5, 256)[:, None]
    own = shared + random(256, 256, seed=2) * 0.05
    many, few, true = Hessian(256), Hessian(256), Hessian(256)
    many.add(random(4000, 256, seed=3) @ shared)
    few.add(random(48, 256, seed=4) @ own)
    true.add(random(4000, 256, seed=5) @ own)
    w = random(256, 128, seed=6)

    def error(hessian):
        lost = w - exl3.quantize_linear(w, hessian, 2).weight
        return float((lost * (true.mean() @ lost)).sum())

    assert error(shrink(few.mean(), few.tokens, many.mean())) < 0.9 * error(few.mean())


def test_hessians_are_symmetric_bit_for_bit():
    hessian = Hessian(600)
    hessian.add(random(500, 600, seed=1))
    mean = hessian.mean()
    assert torch.equal(mean, mean.T)
    x = random(500, 600, seed=1)
    assert torch.allclose(mean, x.T @ x / 500, atol=1e-4)


def test_cholesky_across_its_panels():
    x = random(3000, 1100, seed=1).double()
    matrix = x.T @ x
    factor = matrix.clone()
    factor[0, 1] = 1e9  # above the diagonal: not read
    assert cholesky_(factor)
    assert torch.allclose(factor, torch.linalg.cholesky(matrix), rtol=1e-9, atol=1e-9)
    matrix[800, 800] = -1
    assert not cholesky_(matrix)


def test_same_bits_for_any_number_of_threads(monkeypatch):
    x, y, r = (random(700, n, seed=n) for n in (1100, 1100, 530))
    w = random(1100, 530, seed=3)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(parallel, "_THREADS", threads)
        torch.set_num_threads(threads)
        with parallel.one_thread_per_op():
            moments = means(moments_of(x, y, r))
        results.append((*moments, corrected_weight(w, *moments)))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
