"""Results of comparisons that never took place."""

from exl3.evaluate.result import Divergence, Result, Storage


def result(label, group="EXL3", bpw=4.0, ppl=8.454, kld=0.0788, size=None, **more):
    """A model of about 8 billion weights."""
    divergence = None
    if kld is not None:
        agreement = (0.95, 0.9, 0.8, 0.7, 0.6)
        divergence = Divergence(
            kld, kld * 0.04, kld * 0.3, kld * 2.2, kld * 9, kld * 1.05, agreement
        )
    storage = Storage(bpw, 6.0, bpw, 0.35, int((bpw + 1) * 2**30) if size is None else size)
    return Result(label, group, storage, ppl, 0.05, 20, divergence, **more)


ORIGINAL = result("FP16 [reference]", "other", bpw=16, ppl=8.12, kld=0.0)


def curve(group, factor, names):
    """Quants of one group, better with every bit: names by bits a weight."""
    return [
        result(f"{group} {name}", group, b, 8.12 + factor * 3 * 4 ** (2 - b), factor * 3 ** (1 - b))
        for b, name in names.items()
    ]


TWELVE = [
    *curve("EXL3", 1, {b: f"{b:.2f} bpw h6" for b in (2.26, 3.01, 3.5, 4.01)}),
    *curve("EXL2", 1.3, {b: f"{b:.2f} bpw" for b in (2.5, 3.05, 4.05)}),
    *curve("GGUF", 1.15, {2.8: "Q2_K", 3.44: "Q3_K_S", 3.9: "Q3_K_M", 4.58: "Q4_K_S"}),
    result("AWQ 4bit g128", "AWQ", 4.15, 8.2, 0.05),
]
