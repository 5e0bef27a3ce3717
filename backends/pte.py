"""ExecuTorch's files as one list of steps: kernels that the program calls, and nodes of the graphs within XNNPACK.

A file holds a program, whose calls read and write numbered values, and a graph for each delegate, with values of its
own. Those by which a delegate is called are one with the program's, so that a value is followed through both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from backends.kept import Shape
from backends.xnngraph import Graph, read
from profiles.errors import BuildError

__all__ = ["MAIN", "NOTHING", "READS", "XNNPACK", "Key", "Pte", "Step", "Value"]

MAIN = -1  # the scope of the program's values; those of a graph are in that of the delegate's index
XNNPACK = "XnnpackBackend"
READS = ("input_id", "input1_id", "input2_id", "input3_id", "input4_id", "input5_id", "filter_id", "bias_id")
NOTHING = 2**32 - 1  # the number of no value
_DTYPES = {name: np.dtype(kind) for name, kind in {"FLOAT": "f4", "BOOL": "?", "INT": "i4", "LONG": "i8"}.items()}


class Key(NamedTuple):
    """A value, by its scope and its number there."""

    scope: int
    number: int


@dataclass(frozen=True)
class Value:
    """A tensor; a constant has data, and a name if it is a graph's."""

    shape: Shape
    dtype: "np.dtype[Any]"
    data: NDArray[Any] | None = None
    name: str = ""


@dataclass(frozen=True)
class Step:
    """A kernel's call, or a node of a graph; `literals` are its arguments but tensors, by their place or name."""

    kind: str  # as "aten::mean.out" or "XNNConv2d"
    scope: int
    call: int  # the instruction that it belongs to
    own: Any  # the KernelCall, or the node as its graph holds it
    reads: tuple[Key, ...]
    makes: tuple[Key, ...]
    literals: Mapping[Any, Any]
    bounds: Any = None  # of its results, where an activation was fused with it

    @property
    def handle(self) -> int:
        """Its place in the graph that was lowered, which delegates do not run in order; of nodes only."""
        return int(self.own["debug_handle"])


@dataclass(frozen=True)
class Pte:
    """A file of one method without branches or state, all of whose delegates are XNNPACK's and in fp32."""

    program: Any  # ExecuTorch's own Program
    graphs: tuple[Graph, ...]
    data: Mapping[str, bytes]  # the graphs' constants

    @classmethod
    def load(cls, content: bytes) -> Self:
        """Read a file; raises BuildError if it holds more than this knows."""
        from executorch.exir._serialize import _deserialize_pte_binary
        from executorch.exir.schema import DelegateCall, KernelCall

        file = _deserialize_pte_binary(content)
        plans = file.program.execution_plan
        if len(plans) != 1 or len(plans[0].chains) != 1 or file.mutable_data:
            raise BuildError("the program has several methods, or state, which are not read here")
        calls = [instruction.instr_args for instruction in plans[0].chains[0].instructions]
        foreign = {each.id for each in plans[0].delegates} - {XNNPACK}
        if foreign or not all(isinstance(call, KernelCall | DelegateCall) for call in calls):
            raise BuildError(f"the program branches, or calls {', '.join(foreign)}, which is not read here")
        payloads = [file.program.backend_delegate_data[each.processed.index].data for each in plans[0].delegates]
        named = file.named_data
        held = {} if named is None else {key: bytes(named.buffers[e.buffer_index]) for key, e in named.pte_data.items()}
        return cls(file.program, tuple(read(payloads)), held)

    @property
    def plan(self) -> Any:
        """ExecuTorch's own ExecutionPlan of the method."""
        return self.program.execution_plan[0]

    @property
    def inputs(self) -> list[Key]:
        """What the program is given."""
        return [Key(MAIN, number) for number in self.plan.inputs]

    @property
    def outputs(self) -> list[Key]:
        """What the program returns."""
        return [Key(MAIN, number) for number in self.plan.outputs]

    def constant(self, key: Key) -> bool:
        """Whether a value is a constant."""
        return self.values[key].data is not None

    @cached_property
    def calls(self) -> list[Any]:
        """The KernelCall or DelegateCall of each instruction."""
        return [instruction.instr_args for instruction in self.plan.chains[0].instructions]

    @cached_property
    def keys(self) -> list[dict[int, Key]]:
        """The key of each value of each graph, by its number there; the program's where the delegate is given it."""
        found: list[dict[int, Key]] = [{} for _ in self.graphs]
        for call in self.calls:
            if hasattr(call, "delegate_index"):
                own = found[call.delegate_index]
                for value in map(_fields, self.graphs[call.delegate_index]["xvalues"]):
                    outside = value["external_id"] != NOTHING
                    key = Key(MAIN, call.args[value["external_id"]]) if outside else None
                    own[value["id_out"]] = key or Key(call.delegate_index, value["id_out"])
        return found

    @cached_property
    def values(self) -> dict[Key, Value]:
        """All tensors."""
        found = {}
        for scope, graph in enumerate(self.graphs):
            for value in map(_fields, graph["xvalues"]):
                found[self.keys[scope][value["id_out"]]] = self._held(graph, value)
        for number, evalue in enumerate(self.plan.values):
            if type(evalue.val).__name__ == "Tensor":
                found[Key(MAIN, number)] = self._tensor(evalue.val)
        return found

    def _held(self, graph: Graph, value: Graph) -> Value:
        shape, name = tuple(value["dims"]), graph["constant_data"][value["constant_buffer_idx"]]["named_key"]
        data = np.frombuffer(self.data[name], np.float32).reshape(shape) if name else None
        return Value(shape, _DTYPES["FLOAT"], data, name)

    def _tensor(self, tensor: Any) -> Value:
        shape, dtype = tuple(tensor.sizes), _DTYPES.get(tensor.scalar_type.name)
        if dtype is None:
            raise BuildError(f"the program holds tensors of type {tensor.scalar_type.name}, which are not read here")
        if not tensor.data_buffer_idx:
            return Value(shape, dtype)
        storage = self.program.constant_buffer[tensor.data_buffer_idx].storage
        return Value(shape, dtype, np.frombuffer(storage, dtype, prod(shape)).reshape(shape))

    @cached_property
    def readers(self) -> dict[Key, list[Step]]:
        """The steps that read each value."""
        found: dict[Key, list[Step]] = {key: [] for key in self.values}
        for step in self.steps:
            for key in step.reads:
                found[key].append(step)
        return found

    @cached_property
    def steps(self) -> list[Step]:
        """What is computed, in order."""
        found = []
        for index, call in enumerate(self.calls):
            if hasattr(call, "delegate_index"):
                nodes = self.graphs[call.delegate_index]["xnodes"]
                found += [self._node(call.delegate_index, index, node) for node in nodes]
            else:
                found.append(self._kernel(index, call))
        return found

    def _node(self, scope: int, call: int, node: Graph) -> Step:
        fields, keys = node["xnode_union"], self.keys[scope]
        reads = tuple(keys[fields[name]] for name in READS if fields.get(name, NOTHING) != NOTHING)
        literals = {name: value for name, value in fields.items() if not name.endswith("_id")}
        bounds = node.get("output_min_max")
        return Step(node["xnode_union_type"], scope, call, node, reads, (keys[fields["output_id"]],), literals, bounds)

    def _kernel(self, index: int, call: Any) -> Step:
        operator = self.plan.operators[call.op_index]
        *given, made = map(self._tensors, call.args)  # the last argument names the results again
        literals = {place: self._literal(call.args[place]) for place, keys in enumerate(given) if not keys}
        reads = tuple(key for keys in given for key in keys if key not in made)
        return Step(f"{operator.name}.{operator.overload}", MAIN, index, call, reads, tuple(made), literals)

    def _tensors(self, number: int) -> list[Key]:
        value = self.plan.values[number].val
        if type(value).__name__ == "Tensor":
            return [Key(MAIN, number)]
        return [Key(MAIN, each) for each in value.items] if type(value).__name__ == "TensorList" else []

    def _literal(self, number: int) -> Any:
        """Return the number, list of integers, tuple or None that a value of the program is."""
        value = self.plan.values[number].val
        if type(value).__name__ == "IntList":
            return [self._literal(each) for each in value.items]
        literal = next(iter(vars(value).values()), None)
        return tuple(literal) if isinstance(literal, list) else literal


def _fields(entry: Graph) -> Graph:
    """Return the fields of a graph's value; BuildError if it is quantised."""
    fields: Graph = entry["xvalue_union"]
    if fields.get("datatype") != "xnn_datatype_fp32":
        raise BuildError("the program holds numbers that are not fp32, which are not read here")
    return fields
