"""Where the work runs."""

import torch


def pick_device(wanted: str, flag: str = "-d") -> tuple[torch.device, str | None]:
    """The device that a flag asks for ("cpu", or GPU numbers), and a line to tell the user."""
    if wanted == "cpu":
        return torch.device("cpu"), None
    if torch.cuda.is_available():
        reason = "GPU kernels are not there yet"
    else:
        reason = "no GPU is available here"
    return torch.device("cpu"), f"{flag} {wanted}: {reason}; running on the CPU"
