import pytest
import torch

from tests.models import tiny
from tests.models.conftest import Build
from tests.models.stock import stock_logits, stock_loss, stock_twin
from triptych_kernels import unfuse
from triptych_models.checkpointing import Checkpointing
from triptych_models.generate import generate

SEQ_LEN = 96


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_packed_loss_and_gradients_equal_stock_documents_one_by_one(
    build: Build, documents: list[tiny.Document], tied: bool, fused: bool
) -> None:
    model = build(tied=tied, fuse=fused)
    stock = stock_twin(model)

    out = model(**tiny.pack(documents, SEQ_LEN))
    out.loss_sum.backward()
    expected = stock_loss(stock, model, documents)
    expected.backward()

    assert out.loss_sum.dtype == torch.float32
    assert out.num_targets == sum(int((d.shift_labels != -100).sum()) for d in documents)
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-5, atol=0)
    ours = dict(model.hf.named_parameters())
    theirs = dict(stock.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        difference = (ours[name].grad - parameter.grad).norm()
        assert difference <= 1e-5 * parameter.grad.norm() + 1e-6, name


def test_every_norm_and_mlp_of_the_language_model_is_fused(build: Build) -> None:
    names = set(build().hf.state_dict())
    assert set(build(fuse=False).hf.state_dict()) == names
    norms = {n.removesuffix(".weight") for n in names if n.endswith("norm.weight")}
    mlps = {n.removesuffix(".gate_proj.weight") for n in names if n.endswith("gate_proj.weight")}
    language = {n for n in norms if ".language_model." in n} | mlps
    assert mlps and set(unfuse(build().hf)) == language
    assert unfuse(build(fuse=False).hf) == []


def test_logits_equal_stock(build: Build, documents: list[tiny.Document]) -> None:
    model = build()
    stock = stock_twin(model)
    logits = model.logits(**tiny.inputs_only(tiny.pack(documents, SEQ_LEN)))[0]
    expected = torch.cat([stock_logits(stock, model, doc) for doc in documents])
    torch.testing.assert_close(logits[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_changing_one_document_leaves_the_others_bit_equal(
    build: Build, documents: list[tiny.Document]
) -> None:
    model = build()
    with torch.no_grad():
        before = model.logits(**tiny.inputs_only(tiny.pack(documents, SEQ_LEN)))[0]
        documents[1].input_ids[0] += 1
        documents[1].pixel_values[3] += 1
        after = model.logits(**tiny.inputs_only(tiny.pack(documents, SEQ_LEN)))[0]
    start = len(documents[0].input_ids)
    stop = start + len(documents[1].input_ids)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[stop:], after[stop:])
    assert not torch.equal(before[start:stop], after[start:stop])


def test_text_only_row_gives_the_tower_zero_gradients(build: Build) -> None:
    model = build()
    stock = stock_twin(model)
    documents = [tiny.document(5), tiny.document(6)]
    out = model(**tiny.pack(documents, 32))
    torch.testing.assert_close(out.loss_sum, stock_loss(stock, model, documents), rtol=1e-5, atol=0)
    out.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if ".visual." in name:
            assert not parameter.grad.any(), name


def test_images_or_not_the_same_modules_run_in_the_same_order(
    build: Build, documents: list[tiny.Document]
) -> None:
    model = build()
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    model(**tiny.pack(documents, SEQ_LEN))
    with_images, calls[:] = list(calls), []
    model(**tiny.pack([documents[0]], SEQ_LEN))
    assert calls == with_images


def test_row_without_targets_has_loss_zero_and_zero_gradients(
    build: Build, documents: list[tiny.Document]
) -> None:
    model = build()
    for doc in documents:
        doc.shift_labels[:] = -100
    out = model(**tiny.pack(documents, SEQ_LEN))
    out.loss_sum.backward()
    assert out.loss_sum.item() == 0.0
    assert out.num_targets == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_nothing(
    build: Build, documents: list[tiny.Document], checkpointing: Checkpointing
) -> None:
    plain, checkpointed = build(), build()
    checkpointed.set_checkpointing(checkpointing)
    batch = tiny.pack(documents, SEQ_LEN)
    for model in (plain, checkpointed):
        model(**batch).loss_sum.backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.slow
def test_compiled_layers_change_nothing(build: Build, documents: list[tiny.Document]) -> None:
    plain, compiled = build(), build(compile="layers")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for chosen in (documents, documents[:1], documents[1:]):
        batch = tiny.pack(chosen, SEQ_LEN)
        losses = [model(**batch).loss_sum for model in (plain, compiled)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        difference = (p.grad - q.grad).norm()
        assert difference <= 1e-4 * p.grad.norm() + 1e-6, name
    settings = {"max_new_tokens": 4, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    assert generate(compiled, documents, **settings) == generate(plain, documents, **settings)


@pytest.mark.parametrize("cast_afterwards", [False, True])
def test_rotary_frequencies_stay_fp32_under_bf16(build: Build, cast_afterwards: bool) -> None:
    reference = dict(build().named_buffers())
    model = build().bfloat16() if cast_afterwards else build(dtype=torch.bfloat16)
    buffers = dict(model.named_buffers())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert buffers.keys() == reference.keys()
    for name, buffer in buffers.items():
        assert "inv_freq" in name
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, reference[name])


def test_rotary_frequencies_equal_stock(build: Build) -> None:
    model = build()
    stock = dict(stock_twin(model).named_buffers())
    for name, buffer in model.hf.named_buffers():
        assert torch.equal(buffer, stock[name]), name
