"""Which variant of a kernel a launch takes again; the kernel here stands in for Triton's."""

import pytest
import torch

pytest.importorskip("triton")

from triptych_kernels.triton_ops.launch import launch


class Recorder:
    """Compiles when launched, as a Triton kernel does, and notes what ran."""

    def __init__(self):
        self.compiled, self.launches = 0, []

    def __getitem__(self, grid):
        def compile_and_run(*args, num_warps):
            self.compiled += 1
            return Variant(self, self.compiled)

        return compile_and_run


class Variant:
    """What Triton compiles to; `run` takes the grid, the stream, five of its own, and the rest."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, recorder, number):
        self.recorder, self.number = recorder, number

    def run(self, x, y, z, stream, *args):
        assert args[:5] == ("function", "metadata", None, None, None)
        self.recorder.launches.append((self.number, (x, y, z), stream, args[5:]))


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)


@pytest.fixture
def x():
    return torch.zeros(64)


def test_the_second_launch_takes_the_compiled_variant_with_all_arguments(x):
    kernel = Recorder()
    launch(kernel, (2, 1, 1), (x,), (64, 0.5), (True, 8))
    launch(kernel, (3, 1, 1), (x,), (32, 0.25), (True, 8))
    assert kernel.compiled == 1
    ((number, grid, stream, args),) = kernel.launches
    assert (number, grid, stream) == (1, (3, 1, 1), 7)
    assert args == (x.data_ptr(), 32, 0.25, True, 8)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x[1:],), (64, 0.5), (True, 8), 4),  # a pointer that is not aligned
        lambda x: ((x.half(),), (64, 0.5), (True, 8), 4),
        lambda x: ((x,), (1, 0.5), (True, 8), 4),
        lambda x: ((x,), (63, 0.5), (True, 8), 4),
        lambda x: ((x,), (2**31, 0.5), (True, 8), 4),
        lambda x: ((x,), (64, 0.5), (False, 8), 4),
        lambda x: ((x,), (64, 0.5), (True, 8), 8),
    ],
)
def test_what_triton_specialises_on_is_another_variant(x, other):
    kernel = Recorder()
    launch(kernel, (1, 1, 1), (x,), (64, 0.5), (True, 8), 4)
    launch(kernel, (1, 1, 1), *other(x))
    assert kernel.compiled == 2 and not kernel.launches


def test_nothing_is_remembered_on_rocm(x, monkeypatch):
    """There Triton specialises on the size of a tensor's storage too."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    kernel = Recorder()
    for _ in range(2):
        launch(kernel, (1, 1, 1), (x,), (64, 0.5), (True, 8))
    assert kernel.compiled == 2 and not kernel.launches
