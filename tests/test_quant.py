"""One linear layer: Hessian, incoherence, LDLQ, scales, bad input."""

import pytest
import torch

import exl3
from exl3 import parallel
from exl3.errors import UserError
from exl3.format import decode_layer
from exl3.format.trellis import matrix_to_tiles, pack
from exl3.ops import decode_trellis
from exl3.quant.hessian import Hessian, block_ldl, damped
from exl3.quant.incoherence import regularize, transform_hessian
from exl3.quant.ldlq import ldlq, round_plain
from exl3.quant.linear import proxy_error
from exl3.quant.scale import sample_tiles, search_scale

pytestmark = pytest.mark.usefixtures("all_tiles")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(rows=256, columns=128, seed=0):
    return torch.randn(rows, columns, generator=generator(seed)) * 0.02


def correlated_inputs(features=256, tokens=2000, seed=1):
    mix = torch.randn(features, features, generator=generator(seed))
    mix *= torch.linspace(0.1, 2, features)
    return torch.randn(tokens, features, generator=generator(seed + 1)) @ mix


def hessian_of(inputs):
    return inputs.T @ inputs / len(inputs)


def test_hessian_is_the_mean_of_outer_products():
    x = correlated_inputs(32, 100)
    hessian = Hessian(32)
    hessian.add(x[:60].reshape(3, 20, 32))
    hessian.add(x[60:])
    assert torch.allclose(hessian.mean(), hessian_of(x), rtol=1e-4, atol=1e-3)


def test_block_ldl_factors_the_hessian():
    h = hessian_of(correlated_inputs(64)).double()
    _, h = next(damped(h))
    factor = block_ldl(h)
    blocks = factor.reshape(4, 16, 4, 16).transpose(1, 2)
    for i in range(4):
        assert torch.allclose(blocks[i, i], torch.eye(16, dtype=torch.float64))
        for j in range(i + 1, 4):
            assert not blocks[i, j].any()
    inverse = torch.linalg.inv(factor)
    d = (inverse @ h @ inverse.T).reshape(4, 16, 4, 16).transpose(1, 2)
    off = [d[i, j].abs().max() for i in range(4) for j in range(4) if i != j]
    assert max(off) < 1e-9 * d.abs().max()


def test_block_ldl_tells_indefinite():
    h = torch.eye(32, dtype=torch.float64)
    h[3, 3] = -1
    assert block_ldl(h) is None


def test_regularized_weights_have_unit_variance_and_are_invertible():
    w = weights() * torch.linspace(0.1, 3, 128) * torch.linspace(2, 0.5, 256)[:, None]
    regular = regularize(w, generator())
    inner = regular.inner(regular.input_scales).clone()
    assert inner.square().mean().sqrt() == pytest.approx(1, abs=0.01)
    # The stored form, applied to the inner matrix, gives the weights back.
    from exl3.format.hadamard import hadamard_columns, hadamard_rows

    back = hadamard_rows(hadamard_columns(inner))
    back = back * regular.input_scales[:, None] * regular.svh.float()
    assert torch.allclose(back, w, rtol=1e-4, atol=1e-6)


def test_transformed_hessian_weighs_inner_errors_like_the_original():
    h = hessian_of(correlated_inputs()).double()
    suh = (torch.rand(256, generator=generator()) + 0.5).double()
    error = torch.randn(256, 128, generator=generator(3)).double()
    from exl3.format.hadamard import hadamard_columns

    outer = suh[:, None] * hadamard_columns(error)
    direct = (outer * (h @ outer)).sum()
    inner = (error * (transform_hessian(h, suh) @ error)).sum()
    assert torch.allclose(direct, inner * suh.mean() ** 2, rtol=1e-9)


def test_ldlq_beats_plain_rounding_on_its_objective():
    inner = torch.randn(256, 128, generator=generator())
    h = hessian_of(correlated_inputs()).double()
    _, h = next(damped(h))
    with_feedback, plain = inner.clone(), inner.clone()
    ldlq(with_feedback, block_ldl(h).float(), 2, "mcg")
    round_plain(plain, 2, "mcg")
    energies = [(error.double() * (h @ error.double())).sum() for error in (with_feedback, plain)]
    assert energies[0] < 0.7 * energies[1]


def test_ldlq_targets_follow_their_formula():
    """Every row of tiles answers for all errors behind it, across groups of rows."""
    inner = torch.randn(256, 128, generator=generator())
    _, h = next(damped(hessian_of(correlated_inputs()).double()))
    factor = block_ldl(h).float()
    error = inner.clone()
    states = ldlq(error, factor, 3, "mul1")
    values = decode_trellis(pack(states, 3), "mul1").float()
    assert torch.allclose(error, inner - values, atol=1e-5)
    for a in (0, 112, 128, 240):
        target = inner[a : a + 16] + factor[a + 16 :, a : a + 16].T @ error[a + 16 :]
        again = round_plain(target.clone(), 3, "mul1")
        # The same sum in another order may turn a near tie here and there.
        assert (again == states[a // 16 : a // 16 + 1]).float().mean() > 0.95


@pytest.mark.parametrize("codebook", ["3inst", "mcg", "mul1"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_error_is_near_the_trellis_limit(codebook, bits):
    """Gaussian weights: at most 25% above Shannon's 2^-2K up to 4 bits, 65% up to 8, where single
    weights beyond the codebook's range count: on the average of three draws of the signs."""
    w, seeds = weights(512, 256), range(3)
    errors = [exl3.quantize_linear(w, None, bits, codebook, seed).weight_error for seed in seeds]
    limit = 2.0 ** (-2 * bits)
    assert min(errors) > limit
    assert sum(errors) / len(errors) < limit * (1.25 if bits <= 4 else 1.65)


def test_result_is_what_its_tensors_decode_to():
    w, h = weights(), hessian_of(correlated_inputs())
    result = exl3.quantize_linear(w, h, 3)
    assert set(result.tensors) == {"trellis", "suh", "svh", "mul1"}
    assert result.tensors["trellis"].shape == (16, 8, 48)
    assert torch.equal(decode_layer(result.tensors), result.weight)
    error = w - result.weight
    x = correlated_inputs()
    direct = (x @ error).square().sum() / (x @ w).square().sum()
    assert result.proxy_error == pytest.approx(direct.item(), rel=0.01)
    assert result.proxy_error < 0.6 * proxy_error(w, exl3.quantize_linear(w, None, 3).weight, h)


def test_same_bytes_for_any_number_of_threads(monkeypatch):
    w, h = weights(384, 640), hessian_of(correlated_inputs(384))
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(parallel, "_THREADS", threads)
        torch.set_num_threads(threads)
        results.append(exl3.quantize_linear(w, h, 2).tensors)
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_seed_changes_the_signs():
    a = exl3.quantize_linear(weights(), None, 2, seed=1)
    b = exl3.quantize_linear(weights(), None, 2, seed=2)
    assert not torch.equal(a.tensors["suh"].sign(), b.tensors["suh"].sign())


@pytest.mark.parametrize("shape", [(100, 130), (128, 1), (300, 128)])
def test_other_dimensions_are_padded(shape):
    w = weights(*shape)
    h = hessian_of(correlated_inputs(shape[0]))
    result = exl3.quantize_linear(w, h, 4)
    rows, columns = (-(-n // 128) * 128 for n in shape)
    assert result.tensors["trellis"].shape == (rows // 16, columns // 16, 64)
    assert result.weight.shape == shape
    assert result.weight_error < 0.02
    full = decode_layer(result.tensors)
    assert not full[shape[0] :].any()
    assert not full[:, shape[1] :].any()


def test_zero_layers_and_channels_become_exact_zeros():
    h = hessian_of(correlated_inputs())
    zeros = exl3.quantize_linear(torch.zeros(256, 128), h, 2)
    assert not zeros.weight.any()
    assert zeros.weight_error == 0
    w = weights()
    w[17] = 0
    w[:, 5] = 0
    for hessian in (None, h):
        result = exl3.quantize_linear(w, hessian, 4)
        assert not result.weight[17].any()
        assert not result.weight[:, 5].any()
        assert result.weight_error < 0.02


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e3, 1e6])
def test_scales_at_the_ends_of_float16(scale):
    result = exl3.quantize_linear(weights() * scale, None, 4)
    assert result.weight_error < 0.006


def test_one_scale_for_all_outputs():
    w = weights() * torch.linspace(0.5, 2, 128)
    svh = exl3.quantize_linear(w, None, 3, out_scales="never").tensors["svh"]
    assert svh.abs().unique().numel() == 1


def test_one_channel_far_above_the_others_does_not_overflow():
    w = weights(128, 4096) * 1e-5
    w[:, 7] = torch.randn(128, generator=generator(3))
    result = exl3.quantize_linear(w, None, 4)
    assert torch.isfinite(result.tensors["svh"]).all()
    assert result.weight_error < 0.02


def test_weights_beyond_all_scales_are_told():
    with pytest.raises(UserError, match="beyond what scales in float16 can hold"):
        exl3.quantize_linear(weights() * 1e15, None, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_name_the_tensor(bad):
    w = weights()
    w[3, 4] = bad
    with pytest.raises(UserError, match=r"blk\.7\.weight holds 1 non-finite values of 32,768"):
        exl3.quantize_linear(w, None, 2, name="blk.7.weight")


@pytest.mark.parametrize(
    ("hessian", "note"),
    [
        (None, "no Hessian"),
        (torch.zeros(256, 256), "all-zero Hessian"),
        (torch.full((256, 256), float("nan")), "non-finite"),
    ],
)
def test_useless_hessians_are_told(hessian, note):
    result = exl3.quantize_linear(weights(), hessian, 2)
    assert note in result.notes[0]
    assert result.proxy_error is None
    plain = exl3.quantize_linear(weights(), None, 2)
    assert torch.equal(result.tensors["trellis"], plain.tensors["trellis"])


def test_indefinite_hessians_are_damped_further_up_to_a_limit():
    h = torch.eye(256) * 2
    h[0, 1] = h[1, 0] = 2.4  # smallest eigenvalue -0.4: needs a damping of 0.2 or more
    result = exl3.quantize_linear(weights(), h, 2)
    assert result.notes == ["the Hessian needed a damping of 0.4"]
    h[0, 1] = h[1, 0] = 40
    result = exl3.quantize_linear(weights(), h, 2)
    assert "not positive definite" in result.notes[0]
    assert result.proxy_error is None


def test_bad_arguments_are_told():
    w = weights()
    for arguments, message in (
        ((w[0], None, 2), "float matrix"),
        ((w, torch.eye(3), 2), "256 inputs"),
        ((w, None, 9), "bits"),
        ((w, None, 2, "nf4"), "unknown codebook"),
    ):
        with pytest.raises(ValueError, match=message):
            exl3.quantize_linear(*arguments)


def test_automatic_output_scales_take_the_better_way():
    w = torch.randn(256, 256, generator=generator()) * torch.logspace(-1, 1, 256)
    errors = {
        way: exl3.quantize_linear(w, None, 2, out_scales=way).weight_error
        for way in ("always", "never", "auto")
    }
    assert errors["auto"] == min(errors["always"], errors["never"])


def test_scale_search_finds_the_least_error():
    inner, even = torch.randn(64, 256, generator=generator()), torch.full((64,), 1 / 64)
    found, error = search_scale(inner, even, 4, "mul1")
    assert 0.85 < found < 1.05  # the best one for Gaussian weights is about 0.91
    assert 0.0039 < error < 0.0050
    for factor in (1.05, 0.8, 1.3):  # far from the best for unit variance, too
        other = search_scale(inner * factor, even, 4, "mul1")[0]
        assert other * factor == pytest.approx(found, rel=0.02)


def test_every_tile_counts_by_its_tail():
    tails = torch.rand(5000, generator=generator())
    numbers, counts = sample_tiles(tails)
    assert float(counts.sum()) == pytest.approx(1)
    assert len(set(numbers.tolist())) == len(numbers) == 57  # of the longest tails there are 5
    longest = set(tails.argsort()[-5:].tolist())
    assert longest <= set(numbers.tolist())
    assert float(counts[[n in longest for n in numbers.tolist()]].sum()) == pytest.approx(0.001)
    assert float((tails[numbers] * counts).sum()) == pytest.approx(float(tails.mean()), rel=0.02)
    few, counts = sample_tiles(tails[:40])
    assert sorted(few.tolist()) == [*range(40)] and counts.unique() == 1 / 40


def test_tiles_and_their_tails_are_those_of_the_inner_weight():
    w = torch.randn(128, 256, generator=generator()) * torch.logspace(-1, 1, 256)
    regular = regularize(w, generator())
    tails, tiles = regular.tails(), regular.tiles(torch.tensor([3, 17, 127]))
    inner = matrix_to_tiles(regular.inner(regular.input_scales)).flatten(0, 1)
    assert torch.allclose(tiles, inner[[3, 17, 127]], atol=1e-5)
    assert torch.allclose(tails.flatten(), inner.pow(4).mean(1), rtol=1e-4)


def test_rows_that_are_all_but_equal_cost_little():
    """As of tokens that a model has hardly met: with one draw of signs and an even sample of tiles
    their errors were 2 to 20 times those of independent rows."""
    other = torch.randn(256, 512, generator=generator(2))
    w, common = other.clone(), torch.randn(256, 1, generator=generator())
    for block in range(0, 512, 128):
        w[:, block : block + 96] = common + 0.05 * torch.randn(256, 96, generator=generator(block))
    for seed in range(4):
        independent = exl3.quantize_linear(other, None, 6, seed=seed).weight_error
        assert exl3.quantize_linear(w, None, 6, seed=seed).weight_error < 2 * independent
