"""example-int6: symmetric 6-bit codes, one to a byte, one scale an output channel."""

from harness import Parameter, weight_method

TEXT = "synthetic"  # a dataset's entry point is a specification
BITS = Parameter(int, 6, "bits of a code", choices=(3, 4, 5, 6, 7))


def quantize(weight, bits):
    """(out, in) fp32 -> what is stored; runs on meta tensors too, which predicts the bytes."""
    largest = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(dim=1, keepdim=True) / largest).clamp_min(1e-12)  # a row of zeros
    return {"codes": (weight / scale).round_().char(), "scale": scale}


def dequantize(stored, shape, bits):
    """(out, in) fp32."""
    return stored["codes"].float() * stored["scale"]


METHOD = weight_method(
    name="example-int6",
    summary="symmetric 6-bit codes, absmax scale per output channel",
    bits=6,
    quantize=quantize,
    dequantize=dequantize,
    parameters={"bits": BITS},
    core=False,
)
