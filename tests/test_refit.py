"""Scales fitted again once the codes are there."""

import pytest
import torch

from exl3 import parallel
from exl3.quant import refit
from exl3.quant.hessian import DAMPING
from exl3.quant.linear import quantize_linear
from exl3.quant.refit import refit_output_scales, refit_scales

IN, OUT = 96, 160


def moments(n, seed):
    """Of correlated inputs, as a layer has them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=generator) * torch.arange(1, n + 1) ** -0.5
    mixed = x @ torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    return mixed.T @ mixed / len(mixed)


@pytest.fixture
def layer():
    """W, and Q whose scales are off on both sides besides errors of its own."""
    torch.manual_seed(0)
    wanted = torch.randn(IN, OUT)
    decoded = wanted + 0.2 * torch.randn(IN, OUT)
    return wanted, decoded * (1 + 0.1 * torch.randn(IN, 1)) * (1 + 0.1 * torch.randn(OUT))


def objective(error, hessian, output_hessian):
    """tr(H_out E^T H E) with the damping of the codes."""
    h, h_out = hessian.double().clone(), output_hessian.double().clone()
    for matrix in (h, h_out):
        matrix.diagonal().add_(DAMPING * matrix.diagonal().mean())
    return float((h_out * (error.double().T @ h @ error.double())).sum())


def test_both_scales_are_nearly_the_best_there_are(layer):
    """Against a general optimizer of the same objective."""
    wanted, decoded = layer
    h, h_out = moments(IN, 1), moments(OUT, 2)
    into, out = refit_scales(wanted, decoded, h, h_out)
    found = objective(wanted - into[:, None] * decoded * out, h, h_out)

    scales = [torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (IN, OUT)]
    best = torch.optim.LBFGS(scales, max_iter=300, line_search_fn="strong_wolfe")
    damped = [m.double() + DAMPING * m.diagonal().mean() * torch.eye(len(m)) for m in (h, h_out)]

    def step():
        best.zero_grad()
        error = wanted - scales[0][:, None] * decoded * scales[1]
        loss = (damped[1] * (error.T @ damped[0] @ error)).sum()
        loss.backward()
        return loss

    best.step(step)
    least = step().item()
    before = objective(wanted - decoded, h, h_out)
    assert found - least < 0.02 * (before - least)


def test_one_round_of_output_scales_solves_its_equations(layer, monkeypatch):
    """The gradient of the objective by the output scales is zero but for the ridge's pull."""
    monkeypatch.setattr(refit, "ROUNDS", 1)
    monkeypatch.setattr(refit, "RIDGE", 1e-9)
    wanted, decoded = layer
    h, h_out = moments(IN, 1), moments(OUT, 2)
    inputs_alone = torch.zeros(IN, IN)  # leaves the input scales as they are
    _, out = refit_scales(wanted, decoded, h, h_out)
    scale = out.double().requires_grad_()
    damped = [m.double() + DAMPING * m.diagonal().mean() * torch.eye(len(m)) for m in (h, h_out)]
    error = wanted - decoded * scale
    (gradient,) = torch.autograd.grad((damped[1] * (error.T @ damped[0] @ error)).sum(), scale)
    unfitted = torch.ones(OUT, dtype=torch.float64, requires_grad=True)
    error = wanted - decoded * unfitted
    (at_one,) = torch.autograd.grad((damped[1] * (error.T @ damped[0] @ error)).sum(), unfitted)
    assert gradient.norm() < 1e-3 * at_one.norm()
    assert torch.equal(refit_scales(wanted, decoded, inputs_alone, h_out)[0], torch.ones(IN))


def test_what_is_right_stays_as_it_is(layer):
    wanted, _ = layer
    into, out = refit_scales(wanted, wanted, moments(IN, 1), moments(OUT, 2))
    assert torch.equal(into, torch.ones(IN)) and torch.equal(out, torch.ones(OUT))
    assert torch.allclose(refit_output_scales(wanted, wanted, moments(IN, 1)), torch.ones(OUT))


def test_blocks_of_outputs_are_that_matrix(layer):
    """The last block partly for padding."""
    wanted, decoded = layer
    blocks = torch.stack([moments(64, n) for n in range(3)])
    alone = refit_scales(wanted, decoded, moments(IN, 1), blocks)
    whole = torch.block_diag(*blocks)[:OUT, :OUT]
    # Blocks are damped and pulled to 1 by their own means, the matrix by one.
    for a, b in zip(alone, refit_scales(wanted, decoded, moments(IN, 1), whole), strict=True):
        assert (a - b).norm() < 0.05 * (a - 1).norm()


def test_columns_and_rows_of_zeros_keep_their_scales(layer):
    wanted, decoded = layer
    for w in (wanted, decoded):
        w[5], w[:, 7] = 0, 0
    into, out = refit_scales(wanted, decoded, moments(IN, 1), moments(OUT, 2))
    assert into[5] == pytest.approx(1, abs=1e-3) and out[7] == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(into).all() and torch.isfinite(out).all()
    assert refit_output_scales(wanted, decoded, moments(IN, 1))[7] == 1


def test_the_number_of_threads_changes_no_bit(layer, monkeypatch):
    torch.manual_seed(0)
    wanted, decoded = torch.randn(300, 600), torch.randn(300, 600)
    h, h_out = moments(300, 1), moments(600, 2)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(parallel, "_THREADS", threads)
        with parallel.one_thread_per_op():
            found.append(refit_scales(wanted, decoded, h, h_out))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_quantized_layer_gains_by_it(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(256, 384)
    h, h_out = moments(256, 1), moments(384, 2)

    def lost():
        made = quantize_linear(weight, h, 2, output_hessian=h_out)
        return objective(weight - made.weight, h, h_out)

    fitted = lost()
    monkeypatch.setattr(refit, "ROUNDS", 0)
    assert fitted < 0.99 * lost()
