"""How units pass through layers of sequences: attention, embeddings, recurrence."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from planner.arithmetic import Operand, contract, unknown
from planner.axes import Propagation, Track, Value, arg, kind, place, shape


def attention(state: Propagation, node: Node) -> Value:
    """scaled_dot_product_attention: heads are batch axes; the features that scores sum over set its scale."""
    query, key, value, mask = (*node.args[:3], arg(node, 3, "attn_mask"))
    dims = len(shape(query))
    heads = shape(query)[dims - 3] // shape(key)[dims - 3] if dims > 2 and arg(node, 7, "enable_gqa", False) else 1
    batch = [str(axis) for axis in range(dims - 2)]

    def repeated(argument: Any) -> Operand:
        spread = tuple(
            t.moved(lambda a: np.repeat(a, heads if a.shape[dims - 3] > 1 else 1, axis=dims - 3) if heads > 1 else a)
            for t in state.of(argument)
        )
        size = list(shape(argument))
        if heads > 1 and size[dims - 3] > 1:  # one head of keys for all is broadcast
            size[dims - 3] *= heads
        return spread, tuple(size), []

    wholes = [(state.of(query), shape(query)), repeated(key)[:2], repeated(value)[:2]]
    letters: list[list[str | None]] = [[*batch, "t", None], [*batch, None, None], [*batch, None, "e"]]
    operands: list[Operand] = [(*whole, own) for whole, own in zip(wholes, letters, strict=True)]
    scores = [(_scoring(v), s, own) for v, s, own in operands[:2]]
    if isinstance(mask, Node):
        size = shape(mask)
        scores.append((_scoring(state.of(mask)), size, [*batch, "t", None][len(batch) + 2 - len(size) :]))
    return contract(state, node, [*scores, operands[2]], [*batch, "t", "e"])


def _scoring(value: Value) -> Value:
    """Return the tracks of what only decides where attention looks: its zeros make no zero."""
    return tuple(Track(track.units, np.zeros_like(track.zero)) for track in value)


def embedding(state: Propagation, node: Node) -> Value:
    """Rows of a table; which rows there are is not cut."""
    table = node.args[0]
    out: list[Track] = []
    dims = len(shape(node))
    for track in state.of(table):
        if track.axes == (0,):
            state.freeze(track, f"indexed by {place(node)}")
        else:
            own = state.settle(track).moved(lambda a: a.reshape((1,) * (dims - 1) + (-1,)))
            if track.promise:
                state.make(own.units, node)
            out.append(own)
    return tuple(out)


_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}


def recurrent(state: Propagation, node: Node) -> list[Value]:
    """nn.LSTM, GRU and tanh RNN: one hidden size for all layers and directions; zero rows keep a unit's state zero."""
    source, initial = node.args[:2]
    if not isinstance(arg(node, 3, "has_biases"), bool):  # packed sequences have other arguments
        return [unknown(state, node)] * 3
    parameters: Any = arg(node, 2, "params")
    per = 4 if node.args[3] else 2
    gates, dims = _GATES[kind(node)], len(shape(source))
    directions = 2 if arg(node, 7, "bidirectional") else 1
    layers = [parameters[i : i + per] for i in range(0, len(parameters), per)]
    starts = initial if isinstance(initial, list | tuple) else [initial]
    if any(shape(layer[1])[0] != gates * shape(layer[1])[1] for layer in layers):
        return [unknown(state, node)] * 3
    hidden = state.of(layers[0][1])[-1].along(1)
    zero = _initial_zero(state, node, starts, hidden)
    last = _features(state, node, source)
    for index, own in enumerate(layers):
        if index and index % directions == 0:
            last = (_hidden(np.tile(hidden, directions), dims, zero),)
        _layer(state, node, own, (last, (*shape(source)[:-1], shape(own[0])[1])), hidden, zero)
    state.make(hidden, node)
    whole = (_hidden(np.tile(hidden, directions), dims, zero),)
    return [whole, *[(_hidden(hidden, dims, zero),)] * (2 if kind(node) == "lstm" else 1)]


def cell(state: Propagation, node: Node) -> Any:
    """One step of nn.LSTMCell, GRUCell and tanh RNNCell: as a layer of one step, whose state is given."""
    source, initial, *own = node.args
    starts: Any = initial if isinstance(initial, list | tuple) else [initial]
    hidden = state.of(own[1])[-1].along(1)
    dims = len(shape(source))
    zero = _initial_zero(state, node, starts, hidden)
    parameters: Any = [parameter for parameter in own if isinstance(parameter, Node)]
    _layer(state, node, parameters, (_features(state, node, source), shape(source)), hidden, zero)
    state.make(hidden, node)
    out = (_hidden(hidden, dims, zero),)
    return [out, out] if kind(node) == "lstm_cell" else out


def _features(state: Propagation, node: Node, source: Any) -> Value:
    """Return the track of the features; the steps, over which a state is carried, and the batch cannot be cut."""
    out, dims = [], len(shape(source))
    for whole in state.of(source):
        track = state.single(whole, [dims - 1])
        if track.axes == (dims - 1,):
            out.append(track)
        else:
            state.freeze(track, f"steps of {place(node)}")
    return tuple(out)


def _hidden(units: Any, dims: int, zero: bool) -> Track:
    form = (1,) * (dims - 1) + (-1,)
    return Track(units.reshape(form), np.full(len(units), zero).reshape(form))


def _initial_zero(state: Propagation, node: Node, starts: Sequence[Any], hidden: Any) -> bool:
    """Tie the initial states to the hidden units; return whether they are zero."""
    zero = True
    for start in starts:
        tracks = {track.axes[-1]: track for track in (state.single(t, [t.units.ndim - 1]) for t in state.of(start))}
        own = tracks.pop(len(shape(start)) - 1, None)
        for track in tracks.values():
            state.freeze(track, f"meets an axis that is not cut, {place(node)}")
        if own is None:
            state.freeze(hidden, f"meets an axis that is not cut, {place(node)}")
        else:
            state.tie(own.along(own.axes[0]), hidden)
            zero = zero and bool(state.settle(own).zero.all())
    return zero


def _layer(state: Propagation, node: Node, own: Sequence[Node], source: Any, hidden: Any, zero: bool) -> None:
    gates = shape(own[1])[0] // shape(own[1])[1]
    for index, tensor in enumerate(own):
        rows = next((t for t in state.of(tensor) if t.axes == (0,)), None)
        if rows is not None:
            state.tie(rows.along(0), np.tile(hidden, gates))
            state.settle(rows)
        if index == 1:
            columns = next((t for t in state.of(tensor) if t.axes == (1,)), None)
            if columns is not None:
                state.tie(columns.along(1), hidden)
                state.reading |= columns.promise
                if not zero:
                    state.settle(columns)
    value, size = source
    letters: list[str | None] = [*[str(axis) for axis in range(len(size) - 1)], "in"]
    inputs = tuple(t for t in state.of(own[0]) if t.axes == (1,))
    contract(state, node, [(value, size, letters), (inputs, shape(own[0]), [None, "in"])], letters[:-1])
