"""Names of the codebooks, and the multipliers that mark their layers in a file."""

MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}  # 3inst is marked by the absence of both
