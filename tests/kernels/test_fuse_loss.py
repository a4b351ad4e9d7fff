"""The fused loss: no logits in a call with labels, and logits for whoever reads them."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from triptych_kernels import fuse, unfuse

HIDDEN, VOCABULARY = 8, 40


class LanguageModel(nn.Module):
    """A model of nobody's, with `between` its head and its loss."""

    def __init__(self, between=lambda logits: logits, bias=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
        self.between, self.options = between, options

    def forward(self, ids, labels=None):
        logits = self.between(self.lm_head(self.embed(ids).tanh()))
        if labels is None:
            return None, logits
        shifted, targets = logits[..., :-1, :].contiguous(), labels[..., 1:].reshape(-1)
        loss = F.cross_entropy(shifted.view(-1, VOCABULARY), targets, **self.options)
        return loss, logits


class Largest(TorchDispatchMode):
    """How many elements the largest tensor that anything returned has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def batch(rows=3, length=7, ignored=2):
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :ignored] = -100
    return ids, labels


def run(model, ids, labels):
    model.zero_grad()
    with Largest() as largest:
        loss, logits = model(ids, labels=labels)
        loss.backward()
    return largest.numel, [loss.detach(), *(p.grad for p in model.parameters())], logits


def softcapped(logits):
    return torch.tanh(logits.float() / 5.0) * 5.0


FUSED = {
    "plain": (lambda logits: logits, {}),
    "summed": (lambda logits: logits.float(), {"reduction": "sum"}),
    "smoothed": (lambda logits: logits, {"label_smoothing": 0.2, "ignore_index": -1}),
    "scaled": (lambda logits: 0.5 * logits / 3, {}),
    "softcapped": (softcapped, {}),
    "scaled and softcapped": (lambda logits: softcapped(logits * 3), {}),
}
COMPUTED = {
    "class weights": (lambda logits: logits, {"weight": torch.rand(VOCABULARY)}),
    "not reduced": (lambda logits: logits, {"reduction": "none"}),
    "something else": (lambda logits: logits.sin() + 1, {}),
    "a tensor factor": (lambda logits: logits * torch.rand(VOCABULARY), {}),
    "two caps": (lambda logits: logits.tanh().tanh(), {}),
    "a negative cap": (lambda logits: logits.tanh() * -1, {}),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_same_loss_and_gradients_without_the_logits(name, bias):
    between, options = FUSED[name]
    model = LanguageModel(between, bias, **options)
    ids, labels = batch(rows=20, length=30, ignored=20)
    labels = labels.masked_fill(labels == -100, options.get("ignore_index", -100))
    _, before, _ = run(model, ids, labels)
    assert fuse(model).replaced == {"lm_head": "linear_cross_entropy"}
    numel, after, logits = run(model, ids, labels)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
    assert numel < ids.numel() * VOCABULARY / 2
    torch.testing.assert_close(logits.tensor(), between(model.lm_head(model.embed(ids).tanh())))


@pytest.mark.parametrize("name", COMPUTED)
def test_where_there_is_no_fused_form_the_logits_are_computed(name):
    between, options = COMPUTED[name]
    model = LanguageModel(between, **options)
    model = Summed(model) if options.get("reduction") == "none" else model
    torch.manual_seed(3)
    _, before, _ = run(model, *batch())
    fuse(model)
    torch.manual_seed(3)
    _, after, _ = run(model, *batch())
    torch.testing.assert_close(after, before)


class Summed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, labels):
        loss, logits = self.model(ids, labels=labels)
        return loss.sum(), logits


def test_without_labels_the_head_gives_its_logits():
    model = LanguageModel()
    ids, labels = batch()
    before = model(ids)[1]
    fuse(model)
    assert torch.equal(model(ids)[1], before)
    assert isinstance(model(ids)[1], torch.Tensor)
    model(ids, labels)  # by position, and the flag is taken back
    assert isinstance(model.lm_head(torch.ones(1, HIDDEN)), torch.Tensor)
    assert list(inspect.signature(model.forward).parameters) == ["ids", "labels"]


def test_deferred_logits_are_read_like_a_tensor():
    model = LanguageModel()
    ids, labels = batch()
    _, want = model(ids, labels)
    fuse(model)
    _, logits = model(ids, labels)
    assert "DeferredLogits(shape=(3, 7, 40)" in repr(logits)
    assert logits.shape == logits.size() == want.shape and logits.size(-1) == VOCABULARY
    assert (logits.ndim, logits.dim(), logits.numel(), len(logits)) == (3, 3, want.numel(), 3)
    assert logits.dtype == want.dtype and logits.device == want.device and logits.requires_grad
    for read in (
        lambda x: x.argmax(-1),
        lambda x: x[0] + 0,
        lambda x: x[:, -1, :] * torch.ones(1),
        lambda x: x[..., 3],
        lambda x: x[ids > 5] - 1,
        lambda x: x[1, 2, 3:],
        lambda x: x[:, [0, 1]],
        lambda x: x[None, ..., :].exp(),
        lambda x: x.flatten(0, 1).softmax(-1),
        lambda x: x.flatten(1),
        lambda x: x.view(-1).sum(),
        lambda x: x.reshape(3, 7, VOCABULARY).detach().bfloat16(),
        lambda x: x.to(torch.float64).cumsum(0),
        lambda x: x.to("cpu", torch.float64),
        lambda x: torch.stack([x, x]),
        lambda x: torch.log_softmax(x, dim=-1),
        lambda x: 1 - x / 2 + x * x - -x,
        lambda x: (x > 0) & (x == x),
        lambda x: F.cross_entropy(x.transpose(1, 2), ids),
        lambda x: F.cross_entropy(x.view(-1, VOCABULARY), x.view(-1, VOCABULARY).softmax(-1)),
        lambda x: torch.as_tensor(x.detach().numpy()),
    ):
        torch.testing.assert_close(read(logits), read(want))
    assert not hasattr(logits, "no_such_thing")
    assert [row.shape for row in logits] == [row.shape for row in want]


def test_without_gradients_they_are_a_tensor():
    model = LanguageModel(softcapped)
    ids, labels = batch(rows=20, length=30, ignored=20)
    with torch.no_grad():
        loss, want = model(ids, labels)
        fuse(model)
        with Largest() as largest:
            same_loss, logits = model(ids, labels)
            assert isinstance(logits, torch.Tensor) and logits.shape == want.shape
            assert logits.dtype == want.dtype and not logits.requires_grad and logits.ndim == 3
        assert largest.numel < want.numel() / 2, "nobody has read them"
    torch.testing.assert_close(same_loss, loss)
    for read in (
        lambda x: x.detach(),
        lambda x: x.argmax(-1),
        lambda x: torch.cat([x, x]),
        lambda x: x[:, 1:].float().cpu() + 1,
        lambda x: torch.as_tensor(x.numpy()),
    ):
        torch.testing.assert_close(read(logits), read(want))


def test_under_autocast():
    model = LanguageModel(between=lambda logits: logits.float())
    ids, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, before, want = run(model, ids, labels)
        fuse(model)
        _, after, logits = run(model, ids, labels)
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-3)
    assert logits.dtype == want.dtype == torch.float32
    assert torch.equal(logits.tensor(), want)  # rounded to bfloat16 as the model did


def test_hooks_of_the_head_see_the_loss_computed():
    """Under ZeRO-3 the weight is whole only between them."""
    model, calls = LanguageModel(), []
    fuse(model)
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    model(*batch())
    assert calls == [(3, 7, HIDDEN), (18, HIDDEN)]


def test_in_one_graph():
    model = LanguageModel(softcapped)
    ids, labels = batch()
    _, before, want = run(model, ids, labels)
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss, logits = compiled(ids, labels)
    loss.backward()
    after = [loss.detach(), *(p.grad for p in model.parameters())]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits.tensor(), want)


def test_a_head_that_is_no_plain_linear_is_left_alone():
    model = LanguageModel()
    model.lm_head = nn.Sequential(model.lm_head)
    assert "must be a plain nn.Linear, got Sequential" in fuse(model).left_alone[""]
    model = LanguageModel()
    model.lm_head.forward = lambda x: x
    assert "replaced the forward of its lm_head" in fuse(model).left_alone[""]


def test_a_stock_model_of_transformers_without_its_logits():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.arange(300)[None]
    labels = ids.clone()
    labels[:, :200] = -100

    def step():
        model.zero_grad()
        with Largest() as largest:
            out = model(input_ids=ids, labels=labels, use_cache=False)
            out.loss.backward()
        return largest.numel, out.loss.detach(), [p.grad for p in model.parameters()]

    stock, loss, gradients = step()
    fuse(model)
    fused, again, new = step()
    torch.testing.assert_close((again, new), (loss, gradients), rtol=1e-4, atol=1e-6)
    assert stock >= 300 * 400 > 2 * fused
    assert model.generate(ids[:, :4], max_new_tokens=2).shape == (1, 6)
    assert "lm_head" in unfuse(model)
    assert step()[0] == stock
