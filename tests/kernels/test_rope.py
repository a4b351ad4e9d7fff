import pytest
import torch

from triptych_kernels import RotaryEmbedding, apply_rope, apply_rope_ref, rope_tables


def exact(q, k, cos, sin):
    """The rotation as a product of complex numbers."""
    half = cos.shape[1]
    turn = torch.complex(cos.to(q.dtype), sin.to(q.dtype))[:, None]

    def turned(x):
        y = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        return torch.cat([y.real, y.imag, x[..., 2 * half :]], dim=-1)

    return turned(q), turned(k)


def joined(op, *args, **named):
    return lambda q, k: torch.cat([x.flatten() for x in op(q, k, *args, **named)])


def heads(tokens=7, q_heads=4, k_heads=2, head_dim=16, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(tokens, h, head_dim).to(dtype) for h in (q_heads, k_heads))


def tables(tokens=7, rotary_dim=16):
    inv_freq = 1 / 100 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    return rope_tables(torch.arange(tokens) * 3, inv_freq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "q_heads", "k_heads", "head_dim", "rotary_dim"),
    [(7, 4, 2, 16, 16), (1, 1, 1, 2, 2), (33, 5, 3, 20, 12), (0, 2, 1, 8, 8)],
)
def test_matches_the_formula(check, tokens, q_heads, k_heads, head_dim, rotary_dim, dtype):
    cos, sin = tables(tokens, rotary_dim)
    check(
        joined(apply_rope, cos, sin, rotary_dim=rotary_dim),
        joined(exact, cos, sin),
        *heads(tokens, q_heads, k_heads, head_dim, dtype),
    )


def test_full_tables_and_views_of_one_projection(check):
    cos, sin = tables()
    full = [torch.cat([x, x], dim=-1) for x in (cos, sin)]
    torch.manual_seed(0)
    check(
        lambda qkv: joined(apply_rope, *full)(qkv[:, :4], qkv[:, 4:6]),
        lambda qkv: joined(exact, cos, sin)(qkv[:, :4], qkv[:, 4:6]),
        torch.randn(7, 8, 16),
    )


def test_the_opposite_turn_undoes_it():
    (q, k), (cos, sin) = heads(dtype=torch.float64), tables()
    back = apply_rope(*apply_rope(q, k, cos.double(), sin.double()), cos.double(), -sin.double())
    torch.testing.assert_close(back, (q, k), rtol=1e-6, atol=1e-6)


def test_gradcheck_and_no_gradient_for_the_tables():
    (q, k), (cos, sin) = heads(3, 2, 1, 4, torch.float64), tables(3, 4)
    q, k, cos = q.requires_grad_(), k.requires_grad_(), cos.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: apply_rope_ref(q, k, cos, sin), (q, k))
    assert torch.autograd.grad(apply_rope(q, k, cos, sin)[0].sum(), cos, allow_unused=True) == (
        None,
    )


def test_compiles_in_one_graph():
    inputs = (*heads(), *tables())
    compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), apply_rope(*inputs))


def test_what_does_not_fit_is_refused():
    (q, k), (cos, sin) = heads(), tables()
    with pytest.raises(ValueError, match="flatten the batch first"):
        apply_rope(q[None], k[None], cos, sin)
    with pytest.raises(ValueError, match=r"must be \(7, 8\) or \(7, 16\), got \(7, 6\)"):
        apply_rope(q, k, cos[:, :6], sin[:, :6])
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        apply_rope(q, k, cos, sin, rotary_dim=18)


# Tables


def test_plain_tables():
    module = RotaryEmbedding(8, theta=100.0)
    cos, sin = module(torch.tensor([0, 5]))
    angles = 5 / 100 ** (torch.arange(4) * 2 / 8)
    torch.testing.assert_close(cos, torch.stack([torch.ones(4), angles.cos()]))
    torch.testing.assert_close(sin, torch.stack([torch.zeros(4), angles.sin()]))
    assert cos.shape == (2, 4) and not module.state_dict()


def test_mrope_and_axial_tables_take_each_frequency_from_its_axis():
    inv_freq = torch.ones(8)
    positions = torch.tensor([[0.0], [1.0], [2.0]])
    section = [4, 2, 2]
    angle = torch.tensor([0.0, 1.0, 2.0]).cos().tolist()
    chunked, _ = rope_tables(positions, inv_freq, layout="chunked", mrope_section=section)
    interleaved, _ = rope_tables(positions, inv_freq, layout="interleaved", mrope_section=section)
    axial, _ = rope_tables(positions[1:], inv_freq, layout="axial")
    expected = [[0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2, 0, 0], [1] * 8 + [2] * 8]
    for got, axes in zip((chunked, interleaved, axial), expected, strict=True):
        torch.testing.assert_close(got, torch.tensor([[angle[a] for a in axes]]))


def grid_positions():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3000, (3, 2, 11), generator=generator)


@pytest.mark.parametrize(
    ("family", "name", "layout", "section"),
    [
        ("qwen2_5_vl", "Qwen2_5_VLRotaryEmbedding", "chunked", [4, 6, 6]),
        ("qwen3_vl", "Qwen3VLTextRotaryEmbedding", "interleaved", [6, 5, 5]),
    ],
)
def test_tables_are_those_of_transformers(family, name, layout, section):
    config = transformers_config(family)(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": section},
    )
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    stock = getattr(modeling, name)(config)
    positions = grid_positions()
    cos, sin = rope_tables(positions, stock.inv_freq, layout=layout, mrope_section=section)
    for ours, theirs in zip((cos, sin), stock(torch.ones(1), positions), strict=True):
        assert torch.equal(torch.cat([ours, ours], dim=-1), theirs)
    ours = RotaryEmbedding(32, 5e6, layout=layout, mrope_section=section)(positions)
    torch.testing.assert_close(ours, (cos, sin), rtol=0, atol=1e-3)


def test_rope_turns_heads_as_qwen3_vl_does():
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    (q, k), (cos, sin) = heads(), tables()
    full = [torch.cat([x, x], dim=-1) for x in (cos, sin)]
    theirs = modeling.apply_rotary_pos_emb(q, k, *full, unsqueeze_dim=1)
    torch.testing.assert_close(apply_rope(q, k, cos, sin), theirs)
    halves = (q.bfloat16(), k.bfloat16())
    vision = modeling.apply_rotary_pos_emb_vision(*halves, *full)
    for ours, theirs in zip(apply_rope(*halves, cos, sin), vision, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=8e-3, atol=1e-6)
        assert (ours != theirs).float().mean() < 0.01  # FMA may tip a tie


def test_axial_tables_are_those_of_qwen3_vl():
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    (q, k), grid = heads(8, 2, 2, 16), torch.cartesian_prod(torch.arange(2), torch.arange(4)).T
    inv_freq = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = rope_tables(grid, inv_freq, layout="axial")
    ids = torch.cat([grid[0, :, None] * inv_freq, grid[1, :, None] * inv_freq], dim=-1)
    full = [torch.cat([x, x], dim=-1) for x in (ids.cos(), ids.sin())]
    torch.testing.assert_close(
        apply_rope(q, k, cos, sin), modeling.apply_rotary_pos_emb_vision(q, k, *full)
    )


def transformers_config(family):
    module = pytest.importorskip(f"transformers.models.{family}.configuration_{family}")
    names = {"qwen2_5_vl": "Qwen2_5_VLTextConfig", "qwen3_vl": "Qwen3VLTextConfig"}
    return getattr(module, names[family])


def test_tables_that_do_not_fit_are_refused():
    inv_freq, positions = torch.ones(8), torch.zeros(3, 5)
    with pytest.raises(ValueError, match="layout must be one of plain, chunked"):
        rope_tables(positions, inv_freq, layout="neox")
    with pytest.raises(ValueError, match=r"must be \(2, ...\), got \(3, 5\)"):
        rope_tables(positions, inv_freq, layout="axial")
    with pytest.raises(ValueError, match="three counts that add up to 8"):
        rope_tables(positions, inv_freq, layout="chunked", mrope_section=[4, 2, 1])
