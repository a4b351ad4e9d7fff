"""`attn_implementation="triptych"` in a stock model of transformers, against its own sdpa."""

import subprocess
import sys

import pytest
import torch

from triptych_kernels import register_attention

LENGTHS = [5, 1, 9]


def tiny_model(name, sliding_window):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=sliding_window is not None,
        sliding_window=sliding_window,
        max_window_layers=1,
        attn_implementation=name,
    )
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config)


def packed_inputs():
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    kwargs = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    kwargs |= {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    return torch.arange(sum(LENGTHS))[None] % 32, {"position_ids": positions, **kwargs}


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_a_stock_model_gives_each_document_what_sdpa_gives_it_alone(sliding_window):
    pytest.importorskip("transformers")
    register_attention()
    register_attention("triptych")  # again
    tokens, kwargs = packed_inputs()
    packed = tiny_model("triptych", sliding_window)(tokens, use_cache=False, **kwargs).logits[0]
    alone = tiny_model("sdpa", sliding_window)
    for document, got in zip(tokens[0].split(LENGTHS), packed.split(LENGTHS), strict=True):
        torch.testing.assert_close(got, alone(document[None], use_cache=False).logits[0])


def test_a_soft_cap_reaches_the_op():
    """Against the eager code, which on every version of transformers has the cap."""
    transformers = pytest.importorskip("transformers")
    register_attention()
    config = transformers.Gemma2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=3,
        attn_logit_softcapping=0.1,
        pad_token_id=0,
    )
    models = []
    for name in ("triptych", "eager"):
        torch.manual_seed(0)
        model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation=name)
        for norm in model.modules():
            if "RMSNorm" in type(norm).__name__:
                norm.weight.data.fill_(4.0)  # scores large enough to meet the cap
        models.append(model.eval())
    tokens, kwargs = packed_inputs()
    packed = models[0](tokens, use_cache=False, **kwargs).logits[0]
    for document, got in zip(tokens[0].split(LENGTHS), packed.split(LENGTHS), strict=True):
        want = models[1](document[None], use_cache=False).logits[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for layer in models[0].model.layers:
        layer.self_attn.attn_logit_softcapping = None
    uncapped = models[0](tokens, use_cache=False, **kwargs).logits[0]
    assert (uncapped - packed).abs().max() > 1e-3, "the cap is met"


def test_rows_that_are_not_packed_are_refused():
    pytest.importorskip("transformers")
    register_attention("packed_elsewhere")
    model = tiny_model("packed_elsewhere", None)
    tokens, kwargs = packed_inputs()
    with pytest.raises(ValueError, match="cu_seq_lens_q and max_length_q must be given"):
        model(tokens)
    with pytest.raises(ValueError, match="one row without an attention_mask, got 2 rows"):
        model(tokens.repeat(2, 1), use_cache=False, **kwargs)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"a mask of shape \(1, 15\)"):
        model(tokens, attention_mask=mask, use_cache=False, **kwargs)
    model.train()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match=r"no dropout and no attention sinks, got dropout 0\.5"):
        model(tokens, use_cache=False, **kwargs)


def test_without_transformers_it_says_so():
    code = "import importlib.util as u; f = u.find_spec; "
    code += "u.find_spec = lambda n, *a: None if n == 'transformers' else f(n, *a); "
    code += "import triptych_kernels as t; t.register_attention()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: register_attention: the package transformers must be" in run.stderr
