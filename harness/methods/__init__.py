"""One file a method, or a library's methods; the file's existence is the registration. Listing them imports no torch.

To add a weight-only method, add one file with two functions and METHOD (METHODS where a file has several):

    def quantize(weight, **values): ...           (out, in) fp32 -> {"codes": ..., "scale": ...}
    def dequantize(stored, shape, **values): ...  -> (out, in) fp32
    METHOD = weight_method(name="my-int8", summary="...", bits=8, quantize=quantize, dequantize=dequantize)

`quantizing.codes.Functions` says what the two may rely on, `quantizing.int4` has blocks and packing. Both must work on
meta tensors: predicted bytes come from the same code. Codes that lie as others do are described, not written again:
`codes=Blocks4(LEVELS)` is all of NF4 but its table. Scopes, tied weights, Conv1D, packed experts, the census and the
errors are the base's. A method that loads a model in its own way builds a `contracts.Method` instead.
"""
