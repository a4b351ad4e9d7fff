"""`fuse` on tiny random models of transformers: same outputs and gradients, and back again.

The classes are stock ones; what of each is recognised is said here, so that a new version of
transformers that changes a family shows.
"""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch

from triptych_kernels import fuse, unfuse, use_backend

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "shared_expert_intermediate_size": 16,
}
USUAL = {"rms_norm", "rope", "swiglu", "linear_cross_entropy", "attention"}
GEMMA = {"rms_norm (zero-centred)", "rope", "geglu (tanh)", "linear_cross_entropy"}
HYBRID_OPS = (USUAL - {"rms_norm"}) | {"rms_norm (zero-centred)", "gated_rms_norm", "moe_mlp"}

# family -> what its configuration adds, the ops that it gets, and of what is left alone the reason.
FAMILIES = {
    "Llama": ({}, USUAL, ""),
    "Mistral": ({"sliding_window": 5}, USUAL, ""),
    "Qwen2": ({}, USUAL, ""),
    "Qwen3": ({"tie_word_embeddings": True}, USUAL, ""),
    "Phi3": ({}, USUAL, ""),
    "Olmo2": ({}, (USUAL - {"rms_norm"}) | {"rms_norm (rounded once)"}, ""),
    "Glm4": ({}, USUAL - {"rope"}, "does not turn halves of a head"),
    "Granite": ({"logits_scaling": 4.0}, USUAL, ""),
    "Cohere": (
        {"logit_scale": 0.25},
        {"swiglu", "linear_cross_entropy", "attention"},
        "values|halves",
    ),
    "Gemma2": ({"sliding_window": 5}, GEMMA | {"attention"}, "must be sdpa, is eager"),
    "Gemma3": ({"sliding_window": 5}, GEMMA | {"attention"}, ""),
    "Qwen3Moe": (MOE, (USUAL - {"swiglu"}) | {"moe_mlp"}, ""),
    "Mixtral": (MOE, (USUAL - {"swiglu"}) | {"moe_mlp"}, ""),
    "Qwen3Next": ({**MOE, **HYBRID}, HYBRID_OPS, ""),
}


def build(family):
    options, ops, reason = FAMILIES[family]
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**TEXT, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    # Later versions keep a model with a soft cap from sdpa, which has none.
    is_sdpa = model.config._attn_implementation == "sdpa"
    return model, ops if is_sdpa else ops - {"attention"}, reason


def run(model):
    """-> loss, logits and all gradients for two rows of unequal length, some labels ignored."""
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    out.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.loss.detach(), out.logits.float().detach() + 0, *gradients]


def check(model, ops, reason, run=run, dtype=torch.float32):
    before, keys = run(model), list(model.state_dict())
    report = fuse(model)
    assert set(report.replaced.values()) == set(ops), str(report)
    assert all(reason and re.search(reason, why) for why in report.left_alone.values()), str(report)
    assert list(model.state_dict()) == keys
    rtol, atol = (1e-3, 1e-5) if dtype == torch.float32 else (0.1, 0.02)
    for got, want in zip(run(model), before, strict=True):
        scale = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol * max(1.0, scale))
    twin = copy.deepcopy(model)
    assert all(map(torch.equal, run(twin), run(model)))
    loaded = pickle.loads(pickle.dumps(model))
    unfuse(loaded)
    assert all(map(torch.equal, run(loaded), before))
    assert sorted(unfuse(model)) == sorted(report.replaced)
    assert all(map(torch.equal, run(model), before))
    assert unfuse(model) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_model_keeps_its_values(family):
    check(*build(family))


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Qwen3Moe"])
def test_also_in_bfloat16(family):
    model, ops, reason = build(family)
    check(model.bfloat16(), ops, reason, dtype=torch.bfloat16)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3"])
def test_rows_without_padding_run_on_attention(family):
    """On a CPU only when it is asked for: sdpa is attention's reference there."""
    model, _, _ = build(family)
    ids = torch.arange(24).view(2, 12) % 50
    before = model(input_ids=ids).logits
    fuse(model, ops=["attention"])
    with use_backend(attention="reference"):
        torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids).logits, before)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 2,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "window_size": 16,
    "fullatt_block_indexes": [1],
}


def run_with_an_image(model):
    config = model.config
    grid = torch.tensor([[1, 4, 4]])
    ids = torch.tensor([[5, 6, config.vision_start_token_id, *[config.image_token_id] * 4, 7, 8]])
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(16, width, generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :7] = -100
    model.zero_grad()
    out = model(
        input_ids=ids,
        pixel_values=pixels.to(model.dtype),
        image_grid_thw=grid,
        labels=labels,
        mm_token_type_ids=(ids == config.image_token_id).int(),
    )
    out.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.loss.detach(), out.logits.float().detach() + 0, *gradients]


@pytest.mark.parametrize(
    ("family", "rope", "ops"),
    [
        ("Qwen2_5_VL", {"mrope_section": [2, 3, 3]}, USUAL),
        (
            "Qwen3VL",
            {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
            USUAL | {"layer_norm"},
        ),
    ],
)
def test_vision_language_models(family, rope, ops):
    ids = {"image_token_id": 40, "vision_start_token_id": 42, "vision_end_token_id": 43}
    rope = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    text = {**TEXT, "rope_parameters": rope, "rope_scaling": rope}
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=VISION, **ids, video_token_id=41
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    check(model, ops, "", run=run_with_an_image)


@pytest.mark.parametrize("family", ["SiglipVision", "ViT", "CLIPVision", "Dinov2"])
def test_vision_towers(family):
    config = getattr(transformers, f"{family}Config")(**VISION)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config)

    def run(model):
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        model.zero_grad()
        out = model(pixel_values=pixels).last_hidden_state
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    check(model, {"layer_norm", "attention"}, "", run=run)


def packed(lengths=(5, 1, 9)):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "input_ids": torch.arange(sum(lengths))[None] % 50,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }


def test_packed_rows_of_a_fused_model_are_documents_on_their_own():
    model, _, _ = build("Qwen3")
    row = packed()
    alone = [model(ids[None]).logits[0] for ids in row["input_ids"][0].split([5, 1, 9])]
    fuse(model)
    torch.testing.assert_close(model(**row).logits[0], torch.cat(alone))


def test_packed_rows_under_autocast_where_rope_leaves_q_wider_than_v():
    model, _, _ = build("Qwen3")
    fuse(model, ops=["attention"])
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**packed()).logits
    unfuse(model)
    alone = [model(ids[None]).logits[0] for ids in packed()["input_ids"][0].split([5, 1, 9])]
    torch.testing.assert_close(got[0].float(), torch.cat(alone), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_a_fused_model_compiles_in_one_graph(family):
    model, _, _ = build(family)
    before = run(model)
    fuse(model)
    row = {**packed(), "labels": packed()["input_ids"]}
    want = [model(**row).loss.detach(), *gradients(model, row)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = [compiled(**row).loss.detach(), *gradients(compiled, row)]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    unfuse(model)
    assert all(map(torch.equal, run(model), before))


def gradients(model, row):
    model.zero_grad()
    model(**row).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradient_checkpointing_gives_the_same_bits():
    model, _, _ = build("Qwen3Moe")
    fuse(model)
    model.train()
    plain = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(map(torch.equal, run(model), plain))


def test_a_pickle_of_a_fused_model_runs_where_nothing_was_imported(tmp_path):
    model, _, _ = build("Llama")
    fuse(model)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = "import pickle, sys; model = pickle.load(open(sys.argv[1], 'rb')); "
    code += "import torch; print(model(torch.ones(1, 4).long()).logits.shape)"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pickle")], capture_output=True, text=True
    )
    assert "torch.Size([1, 4, 50])" in run.stdout, run.stderr


def test_saved_folders_know_nothing_of_it(tmp_path):
    model, _, _ = build("Llama")
    fuse(model)
    model.save_pretrained(tmp_path)
    assert "triptych" not in (tmp_path / "config.json").read_text()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_the_trainer_learns_the_same(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": (torch.arange(8) + i) % 50, "labels": torch.arange(8)} for i in range(6)]
    losses = []
    for fused in (False, True):
        model, _, _ = build("Llama")
        if fused:
            fuse(model)
        settings = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, logging_steps=1, use_cpu=True, report_to=[],
            save_strategy="no", eval_strategy="no", learning_rate=0.1, disable_tqdm=True,
            per_device_train_batch_size=2,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model,
            settings,
            train_dataset=rows,
            eval_dataset=rows,
            compute_metrics=lambda guess: {"size": abs(guess.predictions).mean()},
        )
        trainer.train()
        metrics = trainer.evaluate()
        losses.append([*(x["loss"] for x in trainer.state.log_history if "loss" in x)])
        losses[-1] += [metrics["eval_loss"], metrics["eval_size"]]
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
