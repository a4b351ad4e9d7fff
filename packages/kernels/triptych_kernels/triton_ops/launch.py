# mypy: allow-untyped-defs
# (a kernel and its arguments are typed by Triton)
"""Launching a compiled Triton kernel again without the cost of `kernel[grid](...)`.

Triton's own launch works out on every call which of its compiled variants fits the arguments. That
and its look-ups of environment variables take longer on the host than a small kernel runs. Here
the variant is remembered under what Triton specialises on: dtypes, alignment of the pointers,
whether an integer is 1 or a multiple of 16. Triton's launch hooks (its profiler Proton) see a
variant's first launch only. On ROCm Triton also specialises on the size of a tensor's storage, so
that nothing is remembered there.
"""

import torch

_compiled: dict = {}


def launch(kernel, grid, tensors, scalars, constants, num_warps=4):
    """Run `kernel(*tensors, *scalars, *constants)` on a grid of three dimensions.

    `tensors` may repeat a tensor in the place of one that the constants switch off. `constants`
    are the values of the kernel's tl.constexpr parameters, in order. The kernel runs on the device
    of the first tensor and on torch's current stream there.
    """
    device = tensors[0].device.index
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, device, tensors, scalars, constants, num_warps)
    else:
        _launch(kernel, grid, device, tensors, scalars, constants, num_warps)


def _launch(kernel, grid, device, tensors, scalars, constants, num_warps):
    pointers = [x.data_ptr() for x in tensors]
    key = (
        id(kernel),  # its own hash is not cheap
        device,
        num_warps,
        constants,
        tuple([x.dtype for x in tensors]),
        tuple([pointer & 15 == 0 for pointer in pointers]),
        tuple([None if type(n) is float else (n == 1, n & 15 == 0, n >> 31) for n in scalars]),
    )
    known = _compiled.get(key)
    if known is not None:
        run, function, metadata, _ = known
        stream = torch._C._cuda_getCurrentRawStream(device)
        # Plain numbers for pointers: the driver is then not asked about each. No hooks: see above.
        run(*grid, stream, function, metadata, None, None, None, *pointers, *scalars, *constants)
        return
    compiled = kernel[grid](*tensors, *scalars, *constants, num_warps=num_warps)
    if compiled is not None and torch.version.hip is None:  # None under the interpreter
        handles = (compiled.run, compiled.function, compiled.packed_metadata)
        _compiled[key] = (*handles, kernel)  # the kernel, so that its id stays its own
