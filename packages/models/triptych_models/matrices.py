"""What Muon must know of a model: which parameters are matrices, and which are several in one."""

from __future__ import annotations

from torch import nn

# The last words of a parameter's name -> how many matrices lie in its rows. A matrix made
# orthogonal as a whole is another one than its parts made orthogonal each.
STACKED_ROWS = {"qkv.weight": 3, "gate_up_proj.weight": 2, "gate_up_proj": 2}


def matrix_shapes(model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """Shapes (rows, columns) of the matrices in each parameter that Muon may train, by name.

    They are the weights of linear layers, and stacks (E, M, N) of experts. Left out, for AdamW:
    embeddings, the output layer (tied or not), convolutions, norms, biases, and routers. Rows that
    hold several matrices (`STACKED_ROWS`: q, k and v of the vision tower; gate and up) are split.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {id(m.weight) for n, m in model.named_modules() if n.rpartition(".")[2] == "lm_head"}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    found = {}
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        is_layer = id(parameter) in linear and id(parameter) not in tables | heads
        is_stack = len(shape) == 3 and ".experts." in f".{name}"
        if is_layer or is_stack:
            found[name] = _split(name, shape)
    for name, module in model.named_modules():
        if hasattr(module, "in_proj_qkv"):  # of Gated DeltaNet: q and k, and values of their own
            rows, columns = found[f"{name}.in_proj_qkv.weight"][0]
            values = module.value_dim
            keys = (rows - values) // 2
            found[f"{name}.in_proj_qkv.weight"] = [(n, columns) for n in (keys, keys, values)]
    return found


def _split(name: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    *stack, rows, columns = shape
    parts = next((n for end, n in STACKED_ROWS.items() if f".{name}".endswith(f".{end}")), 1)
    assert rows % parts == 0, f"{name}: {rows} rows do not hold {parts} matrices"
    return [(rows // parts, columns)] * parts * (stack[0] if stack else 1)
