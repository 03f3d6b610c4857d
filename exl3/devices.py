"""Where the work runs."""

import torch


def pick_device(wanted: str) -> tuple[torch.device, str | None]:
    """The device for `-d`: "cpu", or GPU numbers. Returns it and a line to tell the user."""
    if wanted == "cpu":
        return torch.device("cpu"), None
    if not torch.cuda.is_available():
        return torch.device("cpu"), f"-d {wanted}: no GPU is available here; running on the CPU"
    return torch.device("cpu"), f"-d {wanted}: GPU kernels are not there yet; running on the CPU"
