"""Number formats by name, and the settings that each of them fixes. Imports no torch, since it checks params.yaml.

    int        integers of 2 to 8 bits, with or without a zero point; one float32 scale for any group
    int16      integers of 16 bits, activations only; static, one float32 scale for any group
    fp8_e4m3   8-bit floats up to ±448; one float32 scale for any group
    mxfp4      E2M1; one power of two as the scale of every 32 values (OCP MX)
    nvfp4      E2M1; one E4M3 scale for every 16 values, and one more scale for the whole tensor

`bits: 16` means "not quantized" in every format but int16, where it is the only number of bits.

E2M1 has a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. E4M3 has four
bits of exponent and three of mantissa. `grids.py` says which scales each format allows.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """The settings that a format fixes.

    Attributes:
        bits: bits of a value; None: any number from 2 to 8.
        block: number of values that share a scale; None: any group size.
    """

    bits: int | None = None
    block: int | None = None


INT, INT16 = "int", "int16"
FORMATS = {INT: Format(), INT16: Format(16), "fp8_e4m3": Format(8), "mxfp4": Format(4, 32), "nvfp4": Format(4, 16)}


def is_quantized(name: str, bits: int) -> bool:
    """Return whether a quantizer of this format and number of bits quantizes: 16 bits mean no, except for int16."""
    return bits < 16 or name == INT16
