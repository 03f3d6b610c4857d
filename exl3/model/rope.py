"""Rotary embeddings stretched by hand, for models whose config does not say what they were
trained with."""

import copy
from dataclasses import dataclass
from typing import Any

from exl3.errors import UserError


@dataclass(frozen=True)
class Rope:
    """What is changed. alpha: NTK-aware factor on the base; scale: positions are divided by it;
    like: `rope_parameters` of a quant, which are taken over as they are."""

    alpha: float | None = None
    scale: float | None = None
    like: dict[str, Any] | None = None

    def parameters(self, config: Any) -> dict[str, Any] | None:
        """The changed `rope_parameters` of a transformers text config; None if nothing changes.

        NTK-aware scaling raises the base to base * alpha^(d / (d - 2)) for heads of d.
        UserError for a model that has no such parameters, or its own kind of scaling.
        """
        found = getattr(config, "rope_parameters", None)
        if self.like is not None:
            return _taken_over(self.like, found)
        if self.alpha is None and self.scale is None:
            return None
        if not isinstance(found, dict) or "rope_theta" not in found:
            raise UserError("-ra and -rs: this model has no single rotary base to change")
        changed = dict(found)
        if self.alpha is not None:
            d = getattr(config, "head_dim", None)
            d = d or config.hidden_size // config.num_attention_heads
            changed["rope_theta"] = found["rope_theta"] * self.alpha ** (d / (d - 2))
        if self.scale is not None:
            if found.get("rope_type", "default") not in ("default", "linear"):
                raise UserError(
                    f"-rs: the model's config has the rotary scaling {found['rope_type']!r} "
                    "already; leave -rs out"
                )
            changed |= {"rope_type": "linear", "factor": self.scale}
        return changed


def _taken_over(like: dict[str, Any], found: Any) -> dict[str, Any] | None:
    if like == found:
        return None
    if not isinstance(found, dict) or "rope_theta" not in found or "rope_theta" not in like:
        raise UserError(
            "the quant's rotary embeddings are of another kind than the original's; give the "
            "original that it was made from"
        )
    return copy.deepcopy(like)


def with_rope(raw: dict[str, Any], changed: dict[str, Any] | None) -> dict[str, Any]:
    """A config.json that says changed `rope_parameters`, in the spelling it uses."""
    if changed is None:
        return raw
    raw = copy.deepcopy(raw)
    text = raw.get("text_config", raw)
    if "rope_parameters" in text:
        text["rope_parameters"] = changed
        return raw
    text["rope_theta"] = changed["rope_theta"]
    if "factor" in changed:
        kind, before = changed["rope_type"], text.get("rope_scaling") or {}
        names = {"type": kind, "rope_type": kind, "factor": changed["factor"]}
        text["rope_scaling"] = {**before, **names}
    return raw
