"""Number formats by name and what each of them fixes; params.yaml is checked with them: torch is not imported here.

    int        integers of 2 to 8 bits, with or without a zero point, one float32 scale for any group
    fp8_e4m3   ±448 with 3 bits of mantissa; one float32 scale for any group
    mxfp4      E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives); a power of two for every 32 values (OCP MX)
    nvfp4      E2M1; a scale in E4M3 for every 16 values, and one for all of them in front of those

E2M1 is sign, two bits of exponent, one of mantissa; E4M3 four and three. What scales there can be is in `grids.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """What a format fixes.

    Attributes:
        bits: of a value; None: any from 2 to 8.
        block: values that share a scale; None: any group.
    """

    bits: int | None = None
    block: int | None = None


INT = "int"
FORMATS = {INT: Format(), "fp8_e4m3": Format(8), "mxfp4": Format(4, 32), "nvfp4": Format(4, 16)}
