"""What every operation does to units: one rule per kind of operation, sent through a whole model."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from planner import arithmetic, indexing, layers, layout, sequences
from planner.axes import Propagation, Value, arg, kind, place, shape

Rule = Callable[[Propagation, Node], Value | list[Value]]

# Functions with f(0) = 0 that act on each element alone.
ZERO_KEEPING = (
    "relu relu_ relu6 relu6_ leaky_relu leaky_relu_ silu silu_ gelu gelu_ tanh tanh_ hardswish hardswish_ mish "
    "mish_ elu elu_ selu selu_ celu celu_ neg abs sqrt softsign softshrink hardshrink tanhshrink erf sin asin "
    "atan sinh expm1 log1p square sign floor ceil round trunc square_ rrelu rrelu_with_noise dropout dropout_ "
    "feature_dropout alpha_dropout native_dropout feature_alpha_dropout clone contiguous to _to_copy alias "
    "detach detach_ lift_fresh_copy lift_fresh lift type_as float half bfloat16 double tril triu nan_to_num "
    "positive requires_grad_ "
).split()
# And with f(0) != 0.
OTHERS = (
    "sigmoid sigmoid_ hardsigmoid hardsigmoid_ softplus exp exp_ exp2 cos cosh acos log_sigmoid logical_not "
    "bitwise_not isnan isinf isfinite threshold ones_like full_like logit "
).split()
_SUM, _PRODUCT = layers.elementwise(product=False), layers.elementwise(product=True)
_COMPARED = (
    "eq ne lt le gt ge __and__ __or__ __xor__ logical_and logical_or logical_xor bitwise_and bitwise_or atan2 "
    "floor_divide remainder fmod "
).split()
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool", "fractional_max_pool")
_INTERPOLATIONS = ("nearest1d", "nearest2d", "nearest3d", "_nearest_exact2d", "linear1d", "bilinear2d", "bicubic2d")
RULES: dict[str, Rule] = {
    **dict.fromkeys(ZERO_KEEPING, layout.same),
    **dict.fromkeys(OTHERS, layers.nonzero),
    **dict.fromkeys(("rsqrt", "reciprocal", "log", "log2", "log10"), layers.reciprocal),
    **dict.fromkeys([f"conv{n}d" for n in (1, 2, 3)] + [f"conv_transpose{n}d" for n in (1, 2, 3)], layers.convolution),
    **dict.fromkeys([f"{name}{n}d" for name in _POOLS for n in (1, 2, 3)], layers.pool),
    **dict.fromkeys([f"max_pool{n}d_with_indices" for n in (1, 2, 3)], layers.pool),
    **dict.fromkeys([f"upsample_{name}" for name in (*_INTERPOLATIONS, "trilinear3d")], layers.pool),
    **dict.fromkeys(("batch_norm", "instance_norm"), layers.batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layers.layer_norm),
    **dict.fromkeys(("add", "add_", "sub", "sub_", "subtract", "rsub", "maximum", "minimum", "max", "min"), _SUM),
    **dict.fromkeys(("mul", "mul_", "multiply", "multiply_"), _PRODUCT),
    **dict.fromkeys(("div", "div_", "divide", "divide_", "true_divide"), layers.divide),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "linalg_vector_norm", "var", "std"), arithmetic.reduce),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "cumsum"), arithmetic.along),
    **dict.fromkeys(("matmul", "bmm", "mm"), arithmetic.matmul),
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as"), layout.reshape
    ),
    **dict.fromkeys(("unsqueeze", "squeeze", "unsqueeze_", "squeeze_", "ravel"), layout.reshape),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "mT", "adjoint", "numpy_T"), layout.transpose),
    **dict.fromkeys(("movedim", "moveaxis"), layout.movedim),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), layout.expand),
    **dict.fromkeys(("repeat", "tile"), layout.repeat),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), layout.split),
    **dict.fromkeys(("slice", "narrow"), layout.slices),
    **dict.fromkeys(("cat", "concat", "concatenate"), layout.cat),
    **dict.fromkeys(("pad", "constant_pad_nd"), layout.pad),
    **dict.fromkeys(("hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_max"), layers.clamp),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh"), sequences.recurrent),
    **dict.fromkeys(("index", "index_select"), indexing.index),
    **dict.fromkeys(_COMPARED, layers.compared),
    "linear": layers.linear,
    "zeros_like": layers.blank,
    "_weight_norm": layers.weight_norm,
    "gather": indexing.gather,
    "cosine_similarity": arithmetic.cosine_similarity,
    **dict.fromkeys(("index_add", "index_add_"), indexing.index_add),
    **dict.fromkeys(("scatter_add", "scatter_add_"), indexing.scatter_add),
    **dict.fromkeys(("gru_cell", "lstm_cell", "rnn_tanh_cell"), sequences.cell),
    "baddbmm": arithmetic.baddbmm,
    "addmm": arithmetic.addmm,
    "outer": arithmetic.outer,
    "einsum": arithmetic.einsum,
    "scaled_dot_product_attention": sequences.attention,
    "group_norm": layers.group_norm,
    "embedding": sequences.embedding,
    "prelu": layers.prelu,
    "glu": layers.glu,
    "where": layers.where,
    "masked_fill": layers.masked_fill,
    "masked_fill_": layers.masked_fill,
    "pow": layers.power,
    "permute": layout.permute,
    "repeat_interleave": layout.repeat_interleave,
    "roll": layout.roll,
    "flip": layout.flip,
    "select": layout.select,
    "unbind": layout.unbind,
    "stack": layout.stack,
    "pixel_shuffle": layout.pixel_shuffle,
    "pixel_unshuffle": layout.pixel_unshuffle,
}
_VIEWS = frozenset(
    ("view", "slice", "select", "transpose", "permute", "unsqueeze", "squeeze", "expand", "flatten", "reshape")
)


def propagate(
    nodes: Sequence[Node], names: dict[str, str], trained: frozenset[str], *, lossy: bool = False
) -> Propagation:
    """Send units through the nodes of an exported graph, in order."""
    state = Propagation(names, trained, lossy)
    for node in nodes:
        state.current = node
        if state.is_constant(node):
            state.constants.add(node)
        elif node.op == "call_function":
            state.values[node] = rule_of(node)(state, node)
            if kind(node).endswith("_") and not kind(node).endswith("__"):
                _overwrite(state, node)
        elif node.op == "output":
            for argument in node.all_input_nodes:
                for track in state.of(argument):
                    state.freeze(track, "it is an output of the model")
    return state


def rule_of(node: Node) -> Rule:
    """Return what a node does to units."""
    if node.target is operator.getitem:
        return layout.item
    name = kind(node)
    if name in ("max", "min") and (len(node.args) < 2 or not isinstance(node.args[1], Node)):
        return _extremum
    if isinstance(node.target, type(operator.add)) or (
        not shape(node) and not isinstance(node.meta.get("val"), tuple | list)
    ):
        return _number
    return RULES.get(name, arithmetic.unknown)


def _number(state: Propagation, node: Node) -> Value:
    """Sizes, checks and scalars carry no units; a scalar made of a cut axis freezes it."""
    if any(isinstance(a, Node) and state.of(a) for a in node.args) and kind(node) not in _HARMLESS:
        return RULES[kind(node)](state, node) if kind(node) in RULES else arithmetic.unknown(state, node)  # type: ignore[return-value]
    return ()


_HARMLESS = frozenset(
    ("sym_size", "_assert_tensor_metadata", "size", "numel", "dim", "_assert_scalar", "is_floating_point")
)


def _extremum(state: Propagation, node: Node) -> Any:
    """max(dim) and min(dim): values and indices."""
    if len(node.args) < 2:
        return arithmetic.unknown(state, node)
    axis, keeps = int(node.args[1]) % len(shape(node.args[0])), bool(arg(node, 2, "keepdim", False))  # type: ignore[arg-type]
    out = []
    for whole in state.of(node.args[0]):
        track = state.single(whole, [a for a in whole.axes if a != axis])
        if axis in track.axes:
            state.freeze(track, f"reduced over by {place(node)}")
        else:
            out.append(track if keeps else track.moved(lambda a: a.squeeze(axis)))
    return [tuple(out), layers.blunted(tuple(out))]


def _overwrite(state: Propagation, node: Node) -> None:
    """Give what an in-place operation wrote to its new tracks; if they differ, what it is a view of is frozen."""
    target: Any = node.args[0]
    before, after = state.of(target), state.of(node)
    state.values[target] = after
    same = len(before) == len(after) and all(
        np.array_equal(a.units, b.units) and np.array_equal(a.zero, b.zero) for a, b in zip(before, after, strict=True)
    )
    while not same and isinstance(target, Node) and kind(target) in _VIEWS and target.args:
        target = target.args[0]
        for track in state.of(target):
            state.freeze(track, f"a part of it is overwritten by {place(node)}")
