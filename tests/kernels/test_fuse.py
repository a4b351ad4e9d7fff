import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triptych_kernels import fuse, modules, rms_norm_ref, unfuse


class Norm(nn.Module):
    """Llama's norm, by another name."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class ZeroCentered(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)
        self.eps = 1e-6

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class Gated(Norm):
    def forward(self, x, gate):
        return (super().forward(x) * F.silu(gate.float())).to(x.dtype)


class OutputRoundedOnce(Norm):
    def forward(self, x):
        wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
        return (self.weight.float() * wide).to(x.dtype)


class Clamped(Norm):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class MLP(nn.Module):
    def __init__(self, width, act_fn, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(width, 3 * width, bias=bias)
        self.up_proj = nn.Linear(width, 3 * width, bias=bias)
        self.down_proj = nn.Linear(3 * width, width, bias=bias)
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PackedMLP(nn.Module):
    """Phi 3's and GLM 4's: one projection for gate and up."""

    def __init__(self, width):
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 6 * width, bias=False)
        self.down_proj = nn.Linear(3 * width, width, bias=False)
        self.activation_fn = nn.SiLU()

    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class Scaled(MLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = Norm(24)
        self.mlp = MLP(24, nn.SiLU(inplace=True))
        self.second = ZeroCentered(24)
        self.tanh = MLP(24, lambda x: F.gelu(x, approximate="tanh"))
        self.exact = MLP(24, nn.GELU(), bias=True)
        self.gated = Gated(24)
        self.layer = nn.LayerNorm(24)
        self.once = OutputRoundedOnce(24)
        self.clamped = Clamped(24)
        self.packed = PackedMLP(24)
        self.relu = MLP(24, nn.ReLU())
        self.scaled = Scaled(24, nn.SiLU())

    def forward(self, x):
        y = self.mlp(self.first(hidden_states=x))
        y = self.exact(self.tanh(self.second(y)))
        y = self.packed(self.once(self.layer(self.gated(y, x))))
        y = self.clamped(y)
        return self.scaled(self.relu(y))


FUSED = {
    "first": "rms_norm",
    "mlp": "swiglu",
    "second": "rms_norm (zero-centred)",
    "tanh": "geglu (tanh)",
    "exact": "geglu",
    "gated": "gated_rms_norm",
    "layer": "layer_norm",
    "once": "rms_norm (rounded once)",
    "packed": "swiglu",
}


def run(model, dtype=torch.float32):
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    model.zero_grad()
    out = model(x)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_modules_compute_the_same_and_unfuse_gives_them_back(dtype):
    model = Model().to(dtype)
    before, state = run(model, dtype), set(model.state_dict())
    forwards = {name: module.forward.__func__ for name, module in model.named_modules()}
    report = fuse(model)
    assert report.replaced == FUSED
    assert set(model.state_dict()) == state and isinstance(model.first, Norm)
    torch.testing.assert_close(run(model, dtype), before)
    assert unfuse(model) == list(FUSED)
    assert {n: m.forward.__func__ for n, m in model.named_modules()} == forwards
    assert all(map(torch.equal, run(model, dtype), before))
    assert unfuse(model) == []


def test_the_report_says_why_a_candidate_was_left_alone():
    model = Model()
    report = fuse(model)
    assert report.left_alone["clamped"] == "it gives other values than the norms here"
    assert report.left_alone["relu"] == "its act_fn is neither silu nor gelu"
    assert "something else than down_proj(swiglu)" in report.left_alone["scaled"]
    assert "9 modules fused, 3 left alone" in str(report) and "  mlp: swiglu" in str(report)
    assert fuse(model).left_alone["first"] == "it is fused already"


class Asserting(Norm):
    def forward(self, x):
        assert x.ndim == 3
        return super().forward(x)


class Dividing(Norm):
    def forward(self, x):
        return super().forward(x) * (1 // (len(x) - len(x)))


class Counting(Norm):
    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_whatever_a_probe_raises_the_rest_is_fused():
    report = fuse(nn.Sequential(Norm(8), Asserting(8), Dividing(8), Norm(8)))
    assert report.replaced == {"0": "rms_norm", "3": "rms_norm"}
    assert "than the norms here (assert" in report.left_alone["1"]
    assert report.left_alone["2"].endswith("by zero)")


def test_a_module_with_a_buffer_is_left_alone_and_its_buffer_too():
    model = nn.Sequential(Counting(8))
    assert fuse(model).left_alone == {"0": "it has more than a weight: calls"}
    assert model[0].calls == 0


def test_the_fused_forward_is_the_op():
    model = Model()
    fuse(model)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \(7,\)"):
        model.first(torch.ones(2, 7))


def test_dry_run_and_a_choice_of_ops():
    model = Model()
    assert fuse(model, dry_run=True).replaced == FUSED and unfuse(model) == []
    report = fuse(model, ops=["swiglu"])
    assert list(report.replaced) == ["mlp", "packed"]
    assert report.left_alone["tanh"] == "geglu (tanh) is not among the ops asked for"
    with pytest.raises(ValueError, match=r"ops must be among attention, .*got \['norm'\]"):
        fuse(model, ops=["norm"])


def test_a_forward_that_something_else_replaced_is_left_alone():
    norm = Norm(8)
    norm.forward = lambda x: x
    assert fuse(nn.Sequential(norm)).left_alone == {"0": "something else has replaced its forward"}


def test_the_probe_touches_neither_weights_nor_hooks_nor_the_random_state():
    with torch.device("meta"):
        assert fuse(nn.Sequential(Norm(4096))).replaced == {"0": "rms_norm"}
    norm = Norm(8)
    norm.register_forward_hook(lambda *args: pytest.fail("the probe ran a hook"))
    weight, state = norm.weight.detach().clone(), torch.get_rng_state()
    fuse(nn.Sequential(norm))
    assert torch.equal(norm.weight, weight) and torch.equal(torch.get_rng_state(), state)


def test_copies_stay_fused_on_their_own_weights_and_pickles_come_back_unfused():
    model = nn.Sequential(Norm(8))
    fuse(model)
    twin = copy.deepcopy(model)
    twin[0].weight.data.zero_()
    x = torch.ones(2, 8)
    assert model(x).any() and not twin(x).any() and unfuse(twin) == ["0"]
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(x), model(x)) and unfuse(loaded) == []
    assert fuse(loaded).replaced == {"0": "rms_norm"}
    assert torch.equal(loaded(x), rms_norm_ref(x, loaded[0].weight, 1e-5))


def test_compiles_in_one_graph_and_checkpoints():
    model = Model()
    fuse(model)
    before = run(model)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), before[0])
    again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    torch.testing.assert_close(again, before[0])


def test_our_own_modules_are_recognised_too():
    report = fuse(nn.ModuleList([modules.RMSNorm(8), modules.GatedRMSNorm(8)]))
    assert list(report.replaced.values()) == ["rms_norm", "gated_rms_norm"]
