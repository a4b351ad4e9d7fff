"""FLOPs of one packed row, counted from integers of the host.

Counted are matrix multiplications (2 per multiply-add): projections, MLPs, attention over the pairs
it really looks at (the causal half in the language model, all of them under masked diffusion, the
whole frame in the tower), patch embedding, mergers, and the head on rows that have a target. Not
counted: embedding look-ups, norms, rotary, softmax, what gradient checkpointing computes again, and
the dummy image of a text-only row.
Every row of T counts, the padding tail too.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from transformers import PretrainedConfig

from .layout import head_dim, mixture_shape, text_config


class Work(NamedTuple):
    """Forward FLOPs of one part: with weights, and of attention, which has none."""

    linear: float
    attention: float


class Layer(NamedTuple):
    """A product of a projector: its multiply-adds, and what of the model lies before its input."""

    products: float
    behind: Literal["tower", "projector", "queries"]
    """the tower's features; also something of the projector that trains; only that"""
    attention: float = 0.0


def qwen3_flops(
    config: PretrainedConfig,
    batch: Mapping[str, Any],
    trainable: Collection[str],
    *,
    adapted: bool = False,
    causal: bool = True,
) -> float:
    """Forward + backward FLOPs of a batch of text alone; see qwen3_vl_flops."""
    trains = "language" in trainable
    weight = trains and not adapted
    return language_flops(config, batch, weight=weight, inputs=trains, causal=causal)


def mixture_flops(
    text: PretrainedConfig,
    batch: Mapping[str, Any],
    trainable: Collection[str],
    num_sparse: int,
    *,
    adapted: bool = False,
) -> float:
    """Forward + backward FLOPs of a language model of which num_sparse layers have experts.

    A token costs its top_k experts, the shared one if there is one, and the router all of them.
    Gradients flow back through everything as soon as anything trains. adapted: see qwen3_vl_flops.
    """
    weights = set() if adapted else trainable
    inputs, tokens = bool(trainable), int(batch["cu_seqlens"][-1])
    shape, hidden_size = mixture_shape(text), text.hidden_size
    each = 2.0 * num_sparse * hidden_size * tokens
    mlps = each * 3 * (shape.shared_width - dense_width(text))
    layers = language_layers(text, [int(x) for x in batch["cu_seqlens"]])
    head = 2.0 * hidden_size * text.vocab_size * int(batch["num_targets"])
    gates = shape.num_experts + shape.has_shared_gate
    works = {
        "language": Work(layers.linear + mlps + head, layers.attention),
        "router": Work(each * gates, 0.0),
        "experts": Work(each * 3 * shape.top_k * shape.width, 0.0),
    }
    return sum(
        with_backward(work, weight=part in weights, inputs=inputs) for part, work in works.items()
    )


def qwen3_vl_flops(
    config: PretrainedConfig,
    batch: Mapping[str, Any],
    trainable: Collection[str],
    *,
    adapted: bool = False,
) -> float:
    """Forward + backward FLOPs of a batch (its cu_seqlens and image_grid_thw on the host).

    trainable names the parts with parameters that train. Backward costs a weight gradient
    (1 × forward) where the part trains and an input gradient (1 × forward; attention 2 ×) where
    something that trains lies before. A frozen part with nothing trainable before it is forward
    only. If what trains is adapters, no weight gradients of the parts are counted, and not the
    adapters themselves.
    """
    weights = set() if adapted else trainable
    return vision_flops(config, batch, trainable, adapted=adapted) + language_flops(
        config.text_config, batch, weight="language" in weights, inputs=bool(trainable)
    )


def vision_flops(
    config: PretrainedConfig,
    batch: Mapping[str, Any],
    trainable: Collection[str],
    *,
    adapted: bool = False,
) -> float:
    """Forward + backward FLOPs of the tower and the projector; see qwen3_vl_flops."""
    grid = batch.get("image_grid_thw")
    grids = [] if grid is None else [tuple(int(n) for n in row) for row in grid]

    vision = config.vision_config
    return tower_flops(
        patch_embedding(vision, grids),
        vision_blocks(vision, grids),
        mergers(vision, grids),
        trainable,
        adapted=adapted,
    )


def one_merger_flops(
    config: PretrainedConfig,
    batch: Mapping[str, Any],
    blocks: Callable[[list[tuple[int, ...]]], Work],
    trainable: Collection[str],
    *,
    adapted: bool,
) -> float:
    """Forward + backward FLOPs of a tower, the one merger behind it, and the language model.

    blocks says the tower's work on images of these grids; the rest as qwen3_vl_flops.
    """
    vision, grid = config.vision_config, batch.get("image_grid_thw")
    grids = [] if grid is None else [tuple(int(n) for n in row) for row in grid]
    return tower_flops(
        patch_embedding(vision, grids),
        blocks(grids),
        patch_merger(vision, grids),
        trainable,
        adapted=adapted,
    ) + language_flops(
        text_config(config),
        batch,
        weight="language" in trainable and not adapted,
        inputs=bool(trainable),
    )


def tower_flops(
    embedding: float, tower: Work, projector: float, trainable: Collection[str], *, adapted: bool
) -> float:
    """Forward + backward of a tower and a projector that begins with a norm of its own, from the
    forward FLOPs of both and of the patch embedding; see qwen3_vl_flops."""
    sees, projects = "vision" in trainable, "projector" in trainable
    weights = set() if adapted else trainable
    embed, merge = Work(embedding, 0.0), Work(projector, 0.0)
    return (
        with_backward(embed, weight="vision" in weights, inputs=False)  # pixels need no gradient
        + with_backward(tower, weight="vision" in weights, inputs=sees)
        + with_backward(merge, weight="projector" in weights, inputs=sees or projects)
    )


def llava_flops(
    config: PretrainedConfig,
    batch: Mapping[str, Any],
    trainable: Collection[str],
    *,
    num_blocks: int,
    projector: Callable[[int], Sequence[Layer]],
    class_tokens: int = 0,
    adapted: bool = False,
) -> float:
    """Forward + backward FLOPs of a LLaVA whose tower runs num_blocks blocks; see qwen3_vl_flops.

    projector says its products for a number of images; the tower sees class_tokens beside an
    image's patches. The tower's learned positions train with
    it, so that gradients flow back through all of its blocks.
    """
    vision = config.vision_config
    grid = batch.get("image_grid_thw")
    grids = [] if grid is None else [tuple(int(n) for n in row) for row in grid]
    patches = sum(t * h * w for t, h, w in grids)
    patch = vision.patch_size
    pixels = vision.num_channels * (patch**2 if isinstance(patch, int) else patch[0] * patch[1])
    embed = Work(2.0 * pixels * vision.hidden_size * patches, 0.0)
    rows: list[tuple[int, ...]] = [(t, 1, h * w + class_tokens) for t, h, w in grids]
    blocks = tower_blocks(vision.hidden_size, vision.intermediate_size, num_blocks, rows)
    weights = set() if adapted else trainable
    sees, projects = "vision" in trainable, "projector" in trainable
    inputs = {"tower": sees, "projector": sees or projects, "queries": projects}
    projected = sum(
        with_backward(
            Work(2.0 * layer.products, 2.0 * layer.attention),
            weight="projector" in weights,
            inputs=inputs[layer.behind],
        )
        for layer in projector(len(grids))
    )
    return (
        with_backward(embed, weight="vision" in weights, inputs=False)  # pixels need no gradient
        + with_backward(blocks, weight="vision" in weights, inputs=sees)
        + projected
        + language_flops(
            config.text_config, batch, weight="language" in weights, inputs=bool(trainable)
        )
    )


def with_backward(work: Work, *, weight: bool, inputs: bool) -> float:
    """Forward + backward of a part whose weights, or whose inputs, need gradients."""
    return work.linear * (1 + weight + inputs) + work.attention * (3 if weight or inputs else 1)


def language_flops(
    text: PretrainedConfig,
    batch: Mapping[str, Any],
    *,
    weight: bool,
    inputs: bool,
    causal: bool = True,
) -> float:
    """Forward + backward FLOPs of decoder layers and head."""
    layers = language_layers(text, [int(x) for x in batch["cu_seqlens"]], causal=causal)
    labels = int(batch.get("num_masked", batch["num_targets"]))
    head = Work(2.0 * text.hidden_size * text.vocab_size * labels, 0.0)
    return with_backward(layers, weight=weight, inputs=inputs) + with_backward(
        head, weight=weight, inputs=inputs
    )


def language_layers(text: PretrainedConfig, bounds: list[int], *, causal: bool = True) -> Work:
    """All decoder layers, with dense MLPs, over documents that end at bounds[1:]."""
    linear = getattr(text, "layer_types", None) or []
    num_linear = linear.count("linear_attention")
    mlps = 3.0 * text.num_hidden_layers * text.hidden_size * dense_width(text)
    full = attention_layer(text, bounds, is_gated=num_linear > 0, causal=causal)
    num_full = text.num_hidden_layers - num_linear
    delta = delta_layer(text, bounds[-1]) if num_linear else Work(0.0, 0.0)
    return Work(
        num_full * full.linear + num_linear * delta.linear + 2.0 * mlps * bounds[-1],
        num_full * full.attention + num_linear * delta.attention,
    )


def dense_width(text: PretrainedConfig) -> int:
    """Of an MLP that all tokens run through; 0 in a model that has none."""
    return getattr(text, "intermediate_size", 0)


def attention_layer(
    text: PretrainedConfig, bounds: list[int], *, is_gated: bool, causal: bool
) -> Work:
    """One layer's softmax attention and its projections; gated, queries bring a gate each."""
    q_dim, kv_dim = (
        heads * head_dim(text) for heads in (text.num_attention_heads, text.num_key_value_heads)
    )
    weights = text.hidden_size * ((3 if is_gated else 2) * q_dim + 2 * kv_dim)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    return Work(2.0 * weights * bounds[-1], 4.0 * q_dim * pairs)


def delta_layer(text: PretrainedConfig, num_tokens: int) -> Work:
    """One layer of Gated DeltaNet.

    Of the rule three products of a state (Dk, Dv) a token and value head, as its recurrence has
    them; chunks, by which kernels compute it, take more. The short convolution is not counted.
    """
    heads, keys = text.linear_num_value_heads, text.linear_num_key_heads
    key_dim, value_dim = keys * text.linear_key_head_dim, heads * text.linear_value_head_dim
    # q, k; v, the gate and the way out; decay and rate of a head
    weights = text.hidden_size * (2 * key_dim + 3 * value_dim + 2 * heads)
    state = text.linear_key_head_dim * text.linear_value_head_dim
    return Work(2.0 * weights * num_tokens, 6.0 * heads * state * num_tokens)


def vision_blocks(vision: PretrainedConfig, grids: list[tuple[int, ...]]) -> Work:
    """All blocks of the tower over frames that each attend to themselves."""
    return tower_blocks(vision.hidden_size, vision.intermediate_size, vision.depth, grids)


def tower_blocks(hidden: int, intermediate: int, depth: int, grids: list[tuple[int, ...]]) -> Work:
    weights = 4 * hidden * hidden + 2 * hidden * intermediate
    patches = sum(t * h * w for t, h, w in grids)
    pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
    return Work(2.0 * depth * weights * patches, 4.0 * depth * hidden * pairs)


def gated_tower(vision: PretrainedConfig, grids: list[tuple[int, ...]], side: int) -> Work:
    """All blocks of a tower with gated MLPs: all but a few attend within windows of side² patches.

    A window at a frame's edge is as large as what is left of the frame.
    """
    hidden, whole = vision.hidden_size, len(vision.fullatt_block_indexes)
    weights = 4 * hidden * hidden + 3 * hidden * vision.intermediate_size
    patches = sum(t * h * w for t, h, w in grids)
    frames = sum(t * (h * w) ** 2 for t, h, w in grids)
    windows = sum(t * _squares(h, side) * _squares(w, side) for t, h, w in grids)
    pairs = whole * frames + (vision.depth - whole) * windows
    return Work(2.0 * vision.depth * weights * patches, 4.0 * hidden * pairs)


def _squares(length: int, side: int) -> int:
    """Sum of squares of the pieces of a length that is cut every side."""
    return length // side * side**2 + (length % side) ** 2


def patch_embedding(vision: PretrainedConfig, grids: list[tuple[int, ...]]) -> float:
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return 2.0 * patch_dim * vision.hidden_size * sum(t * h * w for t, h, w in grids)


def mergers(vision: PretrainedConfig, grids: list[tuple[int, ...]]) -> float:
    """The merger after the tower and one per tapped block."""
    taps = len(getattr(vision, "deepstack_visual_indexes", ()))  # Qwen3.5 has none
    return (1 + taps) * patch_merger(vision, grids)


def patch_merger(vision: PretrainedConfig, grids: list[tuple[int, ...]]) -> float:
    """One merger: two products for each block of patches that becomes a token."""
    unit = vision.spatial_merge_size**2
    wide = vision.hidden_size * unit
    tokens = sum(t * h * w for t, h, w in grids) // unit
    return 2.0 * tokens * wide * (wide + vision.out_hidden_size)
