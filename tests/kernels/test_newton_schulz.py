import pytest
import torch

from triptych_kernels import newton_schulz, newton_schulz_ref
from triptych_kernels.newton_schulz import COEFFICIENTS

SHAPES = [(1, 1), (1, 7), (16, 16), (24, 40), (17, 63), (63, 17), (2, 3, 8, 33)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(values, num_columns):
    """A matrix (len(values), num_columns) in float64 with these singular values."""
    rows = len(values)
    left = torch.linalg.qr(randn(rows, rows).double()).Q
    right = torch.linalg.qr(randn(num_columns, rows, seed=1).double()).Q
    return left @ torch.diag(values) @ right.T


def polar_factor(g):
    left, _, right = torch.linalg.svd(g.double(), full_matrices=False)
    return left @ right


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("coefficients", ["polar_express", "quintic"])
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_compute_the_formula(shape, form, coefficients):
    g = randn(*shape)
    options = {"coefficients": coefficients, "form": form, "compute_dtype": torch.float32}
    want = newton_schulz_ref(g.double(), coefficients=coefficients)
    assert relative(newton_schulz(g, **options), want) < 1e-5
    options["compute_dtype"] = torch.float64
    assert relative(newton_schulz(g.double(), **options), want) < 1e-12


@pytest.mark.parametrize(
    ("coefficients", "low", "high"), [("polar_express", 0.84, 1.15), ("quintic", 0.47, 1.21)]
)
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_singular_values_end_in_the_published_band(form, coefficients, low, high):
    values = torch.logspace(0, -3, 40, dtype=torch.float64)
    values = values / values.norm()
    values = values[values >= 0.001]  # what both are made for
    g = with_singular_values(values, 64)
    for dtype, slack in ((torch.float32, 0.01), (torch.float16, 0.05)):
        y = newton_schulz(g, coefficients=coefficients, form=form, compute_dtype=dtype)
        ends = torch.linalg.svdvals(y.double())
        assert low - slack <= ends.min() and ends.max() <= high + slack


@pytest.mark.parametrize("num_columns", [32, 100])
def test_many_steps_converge_to_the_polar_factor(num_columns):
    g = with_singular_values(torch.linspace(1, 3, 32, dtype=torch.float64), num_columns)
    want = polar_factor(g)
    for form in ("standard", "gram"):
        y = newton_schulz(g, 8, form=form, compute_dtype=torch.float64)
        assert relative(y, want) < 1e-10
    assert relative(newton_schulz(g), want) < 0.12  # 5 steps: within the band


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_truth(dtype):
    g = randn(48, 200)
    want = newton_schulz_ref(g.double())
    plain = relative(newton_schulz_ref(g.to(dtype)), want)
    assert relative(newton_schulz(g, form="standard", compute_dtype=dtype), want) <= 2 * plain
    # The Gram form squares the condition number: it gets its digits from float16.
    gram = newton_schulz(g, form="gram", compute_dtype=dtype)
    assert relative(gram, want) < (0.01 if dtype == torch.float16 else 0.08)


def test_auto_takes_the_gram_form_for_wide_and_tall_matrices():
    for shape, form in (((8, 40), "gram"), ((40, 8), "gram"), ((24, 32), "standard")):
        g = randn(*shape)
        assert torch.equal(newton_schulz(g), newton_schulz(g, form=form))


def test_the_transpose_has_the_transposed_result():
    g = randn(20, 50)
    assert torch.equal(newton_schulz(g.T), newton_schulz(g).T)


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_a_batch_is_its_matrices_one_by_one(form):
    g = randn(3, 2, 12, 30) * torch.logspace(-3, 3, 6).view(3, 2, 1, 1)
    together = newton_schulz(g, form=form, compute_dtype=torch.float32)
    for i in range(3):
        for j in range(2):
            alone = newton_schulz(g[i, j], form=form, compute_dtype=torch.float32)
            torch.testing.assert_close(together[i, j], alone, atol=1e-5, rtol=1e-5)


def test_non_contiguous_inputs_and_dtype_of_the_output():
    g = randn(30, 24)[::2, 1::2].bfloat16()
    y = newton_schulz(g)
    assert y.dtype == torch.bfloat16 and y.shape == g.shape
    assert torch.equal(y, newton_schulz(g.contiguous()))


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_size_of_the_matrix_does_not_matter(form):
    g = randn(16, 40)
    want = newton_schulz(g, form=form, compute_dtype=torch.float32)
    for scale in (1e-6, 1e6):
        y = newton_schulz(g * scale, form=form, compute_dtype=torch.float32)
        torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    huge = (g * 1e4).half()
    assert torch.isfinite(newton_schulz(huge)).all()


def test_zero_and_empty_matrices():
    assert not newton_schulz(torch.zeros(2, 5, 9)).any()
    for shape in ((0, 5, 9), (0, 9), (5, 0), (2, 0, 0)):
        assert newton_schulz(torch.zeros(shape)).shape == shape


def test_twice_the_same_bits():
    g = randn(2, 24, 60)
    assert torch.equal(newton_schulz(g), newton_schulz(g))


def test_gradcheck_of_the_reference():
    g = randn(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda g: newton_schulz_ref(g, 2), g)


def test_compiles_in_one_graph():
    g = randn(2, 12, 30)
    compiled = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(g), newton_schulz(g))


def test_further_steps_are_the_limit_of_the_sequence():
    a, b, c = COEFFICIENTS["polar_express"][1]
    assert a + b + c == 1 and a + 3 * b + 5 * c == 0  # 1 is a fixed point, of third order


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"matrices \(\.\.\., M, N\)"):
        newton_schulz(torch.ones(3))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        newton_schulz(torch.ones(3, 3), 0)
    with pytest.raises(ValueError, match="one of polar_express, quintic, got 'cubic'"):
        newton_schulz(torch.ones(3, 3), coefficients="cubic")
    with pytest.raises(ValueError, match="one of auto, standard, gram, got 'tall'"):
        newton_schulz(torch.ones(3, 3), form="tall")
