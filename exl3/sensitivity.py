"""What bits of a layer are worth: how much its rounding harms the model's predictions."""

import torch

Scales = tuple[torch.Tensor, torch.Tensor]


def channel_scales(weight: torch.Tensor) -> Scales:
    """Of the input channels (in,) and the output channels (out,) of a weight (out, in), float32.

    As `exl3.quant.incoherence` takes them: W_ij over both has unit variance, about, and so
    rounding errors have a variance proportional to the squares of both.
    """
    outputs = weight.float().square().mean(1).sqrt()
    inverse = torch.where(outputs > 0, 1 / outputs, 0.0)
    return (weight.float() * inverse[:, None]).square().mean(0).sqrt(), outputs


def rounding_kld(inputs: torch.Tensor, gradients: torch.Tensor, scales: Scales) -> float:
    """KLD of a layer's rounding errors, per unit of their relative variance, summed over tokens.

    inputs: x (tokens, in); gradients: d (tokens, out), of the loss at the layer's outputs, with
    targets drawn from the model's own predictions. To second order a small change E of W costs a
    KLD of 1/2 sum over tokens of (x^T E d)^2 on average over the targets (Fisher information;
    Martens, arXiv 1412.1193, sections 5 and 9.2); for independent errors of variance v s_i^2 t_j^2
    that is v/2 sum over tokens of |s x|^2 |t d|^2. Both factors belong to one token: activations
    that are huge where the loss does not look do not count.
    """
    s, t = scales
    through = (inputs.float() * s).square().sum(1)
    back = (gradients.float() * t).square().sum(1)
    return 0.5 * float((through.double() * back.double()).sum())


def share_of_tokens(config: object) -> float:
    """Which part of all tokens an expert of a model gets, by its text config; 1 without experts."""
    used = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    if not (isinstance(used, int) and isinstance(experts, int) and 0 < used <= experts):
        return 1.0
    return used / experts
