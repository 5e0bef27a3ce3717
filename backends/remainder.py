"""What is left of an ExecuTorch file when channels and blocks have gone, written as ExecuTorch itself would."""

import hashlib
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any

import numpy as np

from backends.kept import Kept, lengths
from backends.pte import MAIN, NOTHING, READS, XNNPACK, Key, Pte, Step
from backends.xnngraph import ALIGNED, Graph, written

__all__ = ["Remainder", "offsets"]

_ELSEWHERE = 2**64 - 1  # the offset of a constant that is found by its name
_INPUT, _OUTPUT = 1, 2  # flags of a graph's values
_SEGMENTS_ALIGNED = 128  # bytes


@dataclass(frozen=True)
class Remainder:
    """The steps that are left, with their new literals; what is read in place of what; what is kept of tensors."""

    dense: Pte
    steps: Sequence[Step]
    alias: Mapping[Key, Key]
    kept: Mapping[Key, Kept]  # of all that the steps read and make

    def read(self, key: Key) -> Key:
        """Return what is read where the dense program read `key`."""
        while key in self.alias:
            key = self.alias[key]
        return key

    @cached_property
    def calls(self) -> list[list[Step]]:
        """The steps that an output depends on, of each instruction that has any."""
        wanted, found = set(map(self.read, self.dense.outputs)), []
        for step in reversed(self.steps):
            if wanted.intersection(step.makes):
                wanted.update(map(self.read, step.reads))
                found.append(step)
        return [list(steps) for _, steps in groupby(found[::-1], key=lambda step: step.call)]

    @cached_property
    def readers(self) -> dict[Key, set[int]]:
        """The instructions that read each value; who ran the program reads its outputs."""
        found: dict[Key, set[int]] = {self.read(key): {len(self.calls)} for key in self.dense.outputs}
        for index, steps in enumerate(self.calls):
            for key in (self.read(key) for step in steps for key in step.reads):
                found.setdefault(key, set()).add(index)
        return found

    @cached_property
    def makers(self) -> dict[Key, int]:
        """The instruction that makes each value; who runs the program makes its inputs."""
        found = {key: index for index, steps in enumerate(self.calls) for step in steps for key in step.makes}
        return found | dict.fromkeys(self.dense.inputs, -1)

    @cached_property
    def numbers(self) -> dict[Key, int]:
        """The number in the program of each value that has one: some within a graph stand for one that has left."""
        found = {self.read(key): key.number for key in self.alias if key.scope == MAIN}
        return found | {key: key.number for key in self.dense.values if key.scope == MAIN}

    def content(self) -> bytes:
        """Return the content of the file."""
        return _Writing(self).content()


def offsets(sizes: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return where in memory to put tensors of which those that are there at once do not overlap.

    The largest come first, each at the lowest place that is free throughout its span (Pisarchyk & Lee 2020, "greedy by
    size"), as ExecuTorch's planner nearly does.
    """
    placed: dict[int, int] = {}
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        first, last = spans[index]
        others = [other for other in placed if spans[other][0] <= last and first <= spans[other][1]]
        start = 0
        for other in sorted(others, key=placed.__getitem__):
            if start + sizes[index] <= placed[other]:
                break
            start = max(start, placed[other] + sizes[other])
        placed[index] = start
    return [placed[index] for index in range(len(sizes))]


class _Writing:
    """One file in the making: the dense program's values, with another list of instructions."""

    def __init__(self, left: Remainder) -> None:
        self.left, self.dense = left, left.dense
        self.program = copy(self.dense.program)
        self.program.execution_plan = deepcopy(self.dense.program.execution_plan)
        self.plan: Any = self.program.execution_plan[0]
        self.graphs: list[Graph] = []
        self.data: dict[str, bytes] = {}

    def content(self) -> bytes:
        from executorch.exir._serialize import _PTEFile, _serialize_pte_binary
        from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
        from executorch.exir._serialize.data_serializer import DataEntry
        from executorch.exir.schema import Instruction

        calls = [self._call(index, steps) for index, steps in enumerate(self.left.calls)]
        self.plan.chains[0].instructions = [Instruction(call) for call in calls]
        self.plan.outputs = [self.left.numbers[self.left.read(key)] for key in self.dense.outputs]
        self._tensors()
        self._delegates()
        entries = {key: DataEntry(index, ALIGNED, None) for index, key in enumerate(self.data)}
        file = _PTEFile(self.program, None, NamedDataStoreOutput([*self.data.values()], entries, {}))
        made = _serialize_pte_binary(file, extract_delegate_segments=True, segment_alignment=_SEGMENTS_ALIGNED)
        return bytes(made)

    def _call(self, index: int, steps: list[Step]) -> Any:
        from executorch.exir.schema import DelegateCall

        if steps[0].scope == MAIN:
            return self._kernel(steps[0])
        graph, arguments = _Graph(self.left, index, steps).written(self.data)
        self.graphs.append(graph)
        return DelegateCall(len(self.graphs) - 1, [self.left.numbers[key] for key in arguments])

    def _kernel(self, step: Step) -> Any:
        """Return the call of a kernel, and put its new literals and the lists that it reads into the program."""
        call = copy(step.own)
        call.args = list(map(self._argument, call.args))
        for place, literal in step.literals.items():
            if isinstance(literal, list):
                for number, size in zip(self.plan.values[call.args[place]].val.items, literal, strict=True):
                    self.plan.values[number].val.int_val = size
        return call

    def _argument(self, number: int) -> int:
        value = self.plan.values[number].val
        if type(value).__name__ == "TensorList":
            value.items = list(map(self._argument, value.items))
        return self.left.numbers.get(self.left.read(Key(MAIN, number)), number)

    def _tensors(self) -> None:
        """Give the program's tensors their new sizes, contents and places in memory; those that nothing uses leave."""
        from executorch.exir.schema import Null

        used = {
            self.left.numbers[key]: key for key in (*self.left.makers, *self.left.readers) if key in self.left.numbers
        }
        planned = {}
        self.program.constant_buffer = self.dense.program.constant_buffer[:1]
        for number, evalue in enumerate(self.plan.values):
            kind = type(evalue.val).__name__
            needs = {"Tensor": [number], "TensorList": getattr(evalue.val, "items", ())}.get(kind, ())
            if not used.keys() >= set(needs):
                evalue.val = Null()
            elif kind == "Tensor":
                key, tensor = used[number], evalue.val
                tensor.sizes = lengths(self.left.kept[key])
                value = self.dense.values[key]
                if value.data is None:
                    planned[key] = tensor, prod(tensor.sizes) * value.dtype.itemsize
                else:
                    tensor.data_buffer_idx = self._stored(value.data[np.ix_(*self.left.kept[key])].tobytes())
        self._place(planned)

    def _stored(self, content: bytes) -> int:
        """Return the index of a constant among the program's, which holds each once."""
        from executorch.exir.schema import Buffer

        held = self.program.constant_buffer
        found = (index for index, buffer in enumerate(held) if buffer.storage == content)
        index = next(found, len(held))
        held += [Buffer(content)] * (index == len(held))
        return index

    def _place(self, planned: Mapping[Key, tuple[Any, int]]) -> None:
        sizes = [-(-size // ALIGNED) * ALIGNED for _, size in planned.values()]
        spans = [(self.left.makers[key], max(self.left.readers.get(key, {self.left.makers[key]}))) for key in planned]
        places = offsets(sizes, spans)
        for (tensor, _), place in zip(planned.values(), places, strict=True):
            tensor.allocation_info.memory_offset_high, tensor.allocation_info.memory_offset_low = divmod(place, 2**32)
        self.plan.non_const_buffer_sizes = [
            0,
            max((p + size for p, size in zip(places, sizes, strict=True)), default=0),
        ]

    def _delegates(self) -> None:
        from executorch.exir.schema import (
            BackendDelegate,
            BackendDelegateDataReference,
            BackendDelegateInlineData,
            DataLocation,
        )

        self.program.backend_delegate_data = [BackendDelegateInlineData(each) for each in written(self.graphs)]
        places = [BackendDelegateDataReference(DataLocation.INLINE, index) for index in range(len(self.graphs))]
        self.plan.delegates = [BackendDelegate(XNNPACK, place, []) for place in places]


class _Graph:
    """What is left of one delegate's graph; its values are numbered anew, in the order in which they were."""

    def __init__(self, left: Remainder, call: int, steps: Sequence[Step]) -> None:
        self.left, self.call, self.steps, self.scope = left, call, steps, steps[0].scope
        reads = {left.read(key) for step in steps for key in step.reads}
        self.made = {key for step in steps for key in step.makes}
        self.entries: dict[Key, Graph] = {}
        for entry in left.dense.graphs[self.scope]["xvalues"]:
            key = left.read(left.dense.keys[self.scope][entry["xvalue_union"]["id_out"]])
            if key in reads | self.made:
                self.entries.setdefault(key, entry)
        self.numbers = {key: number for number, key in enumerate(self.entries)}

    def written(self, data: dict[str, bytes]) -> tuple[Graph, list[Key]]:
        """Return the graph, and the values that the delegate is called with; its constants go into `data`."""
        constant = {key for key in self.entries if self.left.dense.values[key].name}
        inputs = sorted(self.entries.keys() - constant - self.made, key=self._outside)
        outputs = sorted((key for key in self.made if self.left.readers[key] - {self.call}), key=self._outside)
        constants = [{"offset": 0, "size": 0, "named_key": ""}]
        values = []
        for key, entry in self.entries.items():
            fields = {**entry["xvalue_union"], "id_out": self.numbers[key], "dims": lengths(self.left.kept[key])}
            fields["flags"] &= ~(_INPUT | _OUTPUT)
            fields["external_id"], fields["constant_buffer_idx"] = NOTHING, 0
            if key in inputs or key in outputs:
                fields["external_id"] = [*inputs, *outputs].index(key)
                fields["flags"] |= _INPUT if key in inputs else _OUTPUT
            elif key in constant:
                name, content = self._constant(key)
                data[name], fields["constant_buffer_idx"] = content, len(constants)
                constants.append({"offset": _ELSEWHERE, "size": len(content), "named_key": name})
            values.append({**entry, "xvalue_union": fields})
        graph = {
            **self.left.dense.graphs[self.scope],
            "xnodes": list(map(self._node, self.steps)),
            "xvalues": values,
            "num_externs": len(inputs) + len(outputs),
            "input_ids": [self.numbers[key] for key in inputs],
            "output_ids": [self.numbers[key] for key in outputs],
            "constant_data": constants,
        }
        return graph, [*inputs, *outputs]

    def _outside(self, key: Key) -> int:
        return int(self.entries[key]["xvalue_union"]["external_id"])

    def _constant(self, key: Key) -> tuple[str, bytes]:
        """Return the name and the content of what is left of a constant; it is named by its content, as others are."""
        value, kept = self.left.dense.values[key], self.left.kept[key]
        assert value.data is not None
        if lengths(kept) == list(value.shape):
            return value.name, self.left.dense.data[value.name]
        content = np.ascontiguousarray(value.data[np.ix_(*kept)]).tobytes()
        return hashlib.sha256(content).hexdigest(), content

    def _node(self, step: Step) -> Graph:
        fields, keys = step.own["xnode_union"], self.left.dense.keys[self.scope]
        operands = {name: fields[name] for name in (*READS, "output_id") if fields.get(name, NOTHING) != NOTHING}
        numbers = {name: self.numbers[self.left.read(keys[number])] for name, number in operands.items()}
        return {**step.own, "xnode_union": {**fields, **step.literals, **numbers}, "output_min_max": step.bounds}
