"""The proofs that every family passes, each over the entries of tests/models/proofs.py."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from tests.models.proofs import PROOFS, SEQ_LEN, Proof, wasted_attention
from tests.models.stock import stock_twin
from tests.models.test_text import shake
from tests.ranks import run_ranks
from tools.published import PUBLISHED
from triptych_models.catalogue import FAMILIES
from triptych_models.config import ModelConfig
from triptych_models.export import export, stored_tensors
from triptych_models.fake import pretend
from triptych_models.families import build_model, build_shell
from triptych_models.freeze import count_parameters
from triptych_models.llava import Llava
from triptych_models.pack_cost import pack_cost
from triptych_models.pretend import build_pretend_model, pretend_batch
from triptych_models.weights import whole

# Its build takes minutes and gloo does without it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

ZERO_3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
UPDATES = 60
Build = Callable[..., Any]
each_family = pytest.mark.parametrize("family", PROOFS)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build_tiny(family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        model = build_model(tiny_config(family, tmp_path, **fields), dtype=dtype).train()
        shake(model)  # or norms would be 1 and biases 0, and none would miss them
        return model

    return build_tiny


def tiny_config(family: str, path: Path, **fields: Any) -> ModelConfig:
    if not (path / "tiny").exists():
        PROOFS[family].write(path / "tiny")
    if "experts" in FAMILIES[family].parts:
        fields["moe"] = {"aux_loss": 0.0}  # stock has no loss of routers without labels
    return ModelConfig(path=path / "tiny", init="random", seed=3, **fields)


def stock_loss(proof: Proof, stock: Any, model: Any, documents: list[Any]) -> Tensor:
    def next_tokens(stock: Any, model: Any, doc: Any) -> Tensor:
        return F.cross_entropy(proof.logits(stock, model, doc), doc.shift_labels, reduction="sum")

    loss = proof.loss or next_tokens
    return torch.stack([loss(stock, model, doc) for doc in documents]).sum()


def test_every_family_has_its_proofs_and_is_listed() -> None:
    assert PROOFS.keys() == FAMILIES.keys()
    command = [sys.executable, "-m", "triptych_models"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, family in FAMILIES.items():
        assert f"{name}\n" in listed and family.sizes in listed and family.ran in listed


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_loss_and_gradients_are_stocks(build: Build, family: str, dtype: torch.dtype) -> None:
    proof = PROOFS[family]
    model = build(family, dtype, fuse=dtype == torch.float32)
    stock, documents = stock_twin(model, dtype), proof.documents()
    ours = model(**proof.pack(documents, SEQ_LEN)).loss_sum
    theirs = stock_loss(proof, stock, model, documents)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=0)
    ours.backward()
    theirs.backward()
    wanted, found = dict(stock.named_parameters()), dict(model.hf.named_parameters())
    assert wanted.keys() == found.keys()
    whole = torch.stack([p.grad.norm() for p in wanted.values() if p.grad is not None]).norm()
    for name, parameter in wanted.items():
        if any(idle in name for idle in proof.idle):
            assert found[name].grad is None and not found[name].requires_grad, name
            continue
        difference = (found[name].grad - parameter.grad).norm()
        # Biases of keys have no gradient but rounding.
        assert difference <= proof.rounding * parameter.grad.norm() + 1e-7 * whole, name


@each_family
def test_a_row_is_its_documents_alone(build: Build, family: str) -> None:
    """Losses to 1e-6; and to the last bit, no document sees another."""
    proof, model = PROOFS[family], build(family).eval()
    documents = proof.documents()
    with torch.no_grad():
        packed = model(**proof.pack(documents, SEQ_LEN)).loss_sum
        alone = [model(**proof.pack([doc], SEQ_LEN)).loss_sum for doc in documents]
        torch.testing.assert_close(packed, torch.stack(alone).sum(), rtol=1e-6, atol=0)
        before = row_logits(model, proof, documents)
        documents[1].input_ids[0] += 1
        for media in ("pixel_values", "audio_features"):
            if len(getattr(documents[1], media, ())):
                getattr(documents[1], media)[0] += 1
        after = row_logits(model, proof, documents)
    start, end = (
        len(documents[0].input_ids),
        len(documents[0].input_ids) + len(documents[1].input_ids),
    )
    # An expert multiplies the tokens of all documents at once: how many rounds otherwise.
    settings = {"rtol": 0, "atol": 1e-6 if "experts" in FAMILIES[family].parts else 0}
    torch.testing.assert_close(before[:start], after[:start], **settings)
    torch.testing.assert_close(before[end:], after[end:], **settings)
    assert not torch.equal(before[start:end], after[start:end])


def row_logits(model: Any, proof: Proof, documents: list[Any]) -> Tensor:
    batch = proof.pack(documents, SEQ_LEN)
    inputs = {k: v for k, v in batch.items() if k not in ("shift_labels", "num_targets")}
    logits: Tensor = model.logits(**inputs)[0]
    return logits


@each_family
def test_it_learns_what_it_sees(build: Build, family: str) -> None:
    proof, model = PROOFS[family], build(family)
    batch = proof.pack(proof.documents(), SEQ_LEN)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(UPDATES):
        loss = model(**batch).loss_sum / batch["num_targets"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if losses[-1] < proof.learns:
            break
    assert losses[0] > 4 and losses[-1] < proof.learns, (losses[0], losses[-1])


@each_family
def test_parts_freeze(build: Build, family: str) -> None:
    """A frozen part has no gradients, and the others' are what they were."""
    proof, parts = PROOFS[family], FAMILIES[family].parts
    batch = proof.pack(proof.documents(), SEQ_LEN)
    whole = build(family)
    assert tuple(count_parameters(whole)) == parts
    assert sum(count_parameters(whole).values()) == sum(p.numel() for p in whole.parameters())
    whole(**batch).loss_sum.backward()
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    for frozen in parts if len(parts) > 1 else ():
        model = build(family, freeze=[frozen])
        model(**batch).loss_sum.backward()
        assert model.trainable_parts() == {*parts} - {frozen}
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5)
            else:
                assert p.grad is None, name


@each_family
def test_flops_are_those_that_torch_counts(build: Build, family: str) -> None:
    """Of stock's eager forward and backward, less what causal attention need not look at."""
    proof, parts = PROOFS[family], FAMILIES[family].parts
    documents = [doc for doc in proof.documents() if has_media(doc, parts)]
    documents = [doc for doc in documents if proof.is_all_counted(doc)]
    # Of one token torch counts a convolution's backward otherwise in a model than by itself.
    documents = [doc for doc in documents if len(doc.input_ids) > 1]
    batch = proof.pack(documents, sum(len(doc.input_ids) for doc in documents))
    batch["num_targets"] = batch["input_ids"].shape[1]  # stock computes every row's logits
    towers = [part for part in parts if part in ("vision", "audio")]
    cases = [[], towers, ["projector"], ["language"], [*towers, "language"]]
    for frozen in cases if towers and "experts" not in parts else [[]]:
        model = build(family, freeze=frozen)
        assert model.flops(batch) == counted(proof, model, documents), frozen


def has_media(doc: Any, parts: tuple[str, ...]) -> bool:
    """All that the model takes: a tower that is not called trains nothing."""
    sees, hears = len(doc.image_grid_thw), len(getattr(doc, "audio_lengths", ()))
    return all(media for part, media in (("vision", sees), ("audio", hears)) if part in parts)


def counted(proof: Proof, model: Any, documents: list[Any]) -> float:
    stock = stock_twin(model)
    stock.set_attn_implementation("eager")
    for p, q in zip(stock.parameters(), model.hf.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    for name, module in stock.named_modules():
        if any(f"{name}.".endswith(idle) for idle in proof.idle):
            module.forward = lambda hidden_states, *_, **__: hidden_states
    with FlopCounterMode(display=False) as counter:
        for doc in documents:
            (proof.loss or proof.logits)(stock, model, doc).sum().backward()
    lengths = [len(doc.input_ids) for doc in documents]
    wasted = wasted_attention(model.hf.config, lengths) + proof.wasted(stock, lengths)
    return counter.get_total_flops() - wasted


@pytest.mark.parametrize("family", PUBLISHED)
def test_weights_of_a_published_size_are_stocks(tmp_path: Path, family: str) -> None:
    """On the meta device: names and shapes of modules, their number, and names in the folder."""
    name, fields, parameters, stored = PUBLISHED[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **fields}))
    with torch.device("meta"):
        model = build_shell(ModelConfig(path=tmp_path), dtype=torch.bfloat16)
        stock = type(model).hf_class._from_config(AutoConfig.from_pretrained(tmp_path))
    assert {n: p.shape for n, p in model.hf.named_parameters()} == {
        n: p.shape for n, p in stock.named_parameters()
    }
    assert sum(p.numel() for p in model.parameters()) == parameters, name
    shapes = {n: tuple(p.shape) for n, p in stored_tensors(model.hf, whole)}
    assert {*stored} <= shapes.keys()
    published = revert_weight_conversion(stock, stock.state_dict())
    if family == "qwen3_5_moe":  # its folder has stacks, which stock reads but would write apart
        published = stock.state_dict()
    if stock.config.tie_word_embeddings:  # stored once
        published = {n: p for n, p in published.items() if not n.endswith("lm_head.weight")}
    found = {n: tuple(p.shape) for n, p in published.items()}
    if family == "qwen3_vl_moe":  # its folder's stacks are transposed, which stock undoes by shape
        shapes, found = ({n: sorted(x) for n, x in each.items()} for each in (shapes, found))
    assert shapes == found


@each_family
def test_folders_go_out_and_come_back(build: Build, tmp_path: Path, family: str) -> None:
    """What is written, stock loads; what stock writes, is read; under the published names."""
    model = build(family)
    export(model.hf, tmp_path / "ours", tmp_path / "tiny", dtype=torch.float32)
    hf_class = type(model).hf_class
    stock, info = hf_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    stock.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = build_model(ModelConfig(path=tmp_path / folder), dtype=torch.float32)
        for (name, parameter), other in zip(
            model.named_parameters(), again.parameters(), strict=True
        ):
            assert torch.equal(parameter, other), name
    written = [load_file(tmp_path / n / "model.safetensors").keys() for n in ("ours", "theirs")]
    assert written[0] == written[1]


@each_family
def test_a_plan_can_trace_it_and_weigh_its_packs(tmp_path: Path, family: str) -> None:
    """A step on tensors without memory; and what a pack costs grows with all that is in it."""
    model = build_pretend_model(tiny_config(family, tmp_path), dtype=torch.float32)
    sees = "vision" in FAMILIES[family].parts
    hears = "audio" in FAMILIES[family].parts
    with pretend(model):
        settings = {"image_share": 0.5, "target_share": 0.5, "image_tokens": 4}
        settings |= {"audio_share": 0.25, "audio_seconds": 0.16}
        batch = pretend_batch(model, 64, document_len=32, **settings)
        model(**batch).loss_sum.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert ("audio_lengths" in batch) == hears
    if sees and not isinstance(model, Llava):  # nor does an image of the usual size fit
        with pretend(model):
            large = settings | {"image_tokens": 256, "audio_share": 0.0}
            short = pretend_batch(model, 20, document_len=20, **large)
            model(**short).loss_sum.backward()
        assert int(short["image_positions"].max()) < 20
    if hears:  # as many tokens as asked for, and none of an image
        heard, seen = batch["audio_positions"], batch.get("image_positions", torch.tensor([]))
        assert 12 <= len(heard) <= 16 and len({*heard.tolist(), *seen.tolist()}) == len(
            heard
        ) + len(seen)
        with pretend(model):  # recordings of the usual length do not fit
            for share, tokens in ((0.25, (8, 16)), (1.0, (48, 64))):
                settings |= {"audio_share": share, "audio_seconds": 30.0, "image_share": 1 - share}
                batch = pretend_batch(model, 64, document_len=32, **settings)
                model(**batch).loss_sum.backward()
                assert tokens[0] <= len(batch["audio_positions"]) <= tokens[1]
    ratios = pack_cost(model.flops, images=sees, sound=hears)
    assert ("audio" in ratios) == hears and ratios.get("audio", 1) > 0
    assert ratios["linear"] > 0 and ratios["target"] > 0 and (ratios["vision"] > 0) == sees


def gather(parameters: list[torch.nn.Parameter]) -> deepspeed.zero.GatheredParameters:
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


@pytest.fixture(scope="module")
def sharded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What went wrong in each family that is asked for, of one job of two ranks for all."""
    test = test_zero_3_on_two_ranks_is_one_rank.__name__
    items = [item for item in request.session.items if item.name.startswith(test)]
    families = [item.callspec.params["family"] for item in items]  # type: ignore[attr-defined]
    configs = {name: tiny_config(name, tmp_path_factory.mktemp(name)) for name in families}
    first, second = run_ranks(steps_sharded, 2, configs)
    return {name: first[name] + second[name] for name in families}


@each_family
def test_zero_3_on_two_ranks_is_one_rank(sharded: dict[str, str], family: str) -> None:
    """One rank has text alone, the other all modalities; two steps, so that module order holds."""
    assert not sharded[family], sharded[family]


def steps_sharded(configs: dict[str, ModelConfig]) -> dict[str, str]:
    deepspeed.init_distributed("gloo")
    return {name: "".join(step_sharded(name, config)) for name, config in configs.items()}


def step_sharded(family: str, config: ModelConfig) -> Iterator[str]:
    rank, proof = torch.distributed.get_rank(), PROOFS[family]
    with deepspeed.zero.Init(config_dict_or_path=ZERO_3):
        sharded = build_model(config, dtype=torch.float32, gather=gather).train()
    trained = [p for p in sharded.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    engine, *_ = deepspeed.initialize(model=sharded, optimizer=optimizer, config=ZERO_3)
    documents = proof.documents()
    batches = [proof.pack(chosen, SEQ_LEN) for chosen in (documents, documents[:1])]
    plain = build_model(config, dtype=torch.float32).train()
    for batch in batches:
        plain(**batch).loss_sum.backward()
    for step in range(2):
        engine.backward(engine(**batches[rank]).loss_sum)
        for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                difference = float((safe_get_full_grad(p) - q.grad / 2).norm())
                if not difference <= 1e-5 * float(q.grad.norm()) + 1e-6:
                    yield f"step {step}, rank {rank}: {name} off by {difference:.1e}; "
        engine.step()
