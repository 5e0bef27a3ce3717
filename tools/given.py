"""Plans whose widths were given instead of searched: the protocols of papers, and comparisons of training alone."""

from collections.abc import Mapping

from planner import Plan
from planner.document import per_width_pools
from planner.graph import Graph
from planner.spec import BlockPlan, InputSpec, Prediction, Proof, WidthPlan


def given(graph: Graph, keep: Mapping[str, int]) -> Plan:
    """Return the plan that keeps so many channels of each named width, and all blocks."""
    sizes = {name: (graph.width[name].size, kept) for name, kept in keep.items()}
    widths = tuple(
        WidthPlan(name=name, dense=size, keep=kept, considered=(kept, size), cost_s=0.0)
        for name, (size, kept) in sizes.items()
    )
    blocks = tuple(BlockPlan(name=block.name, removed=False) for block in graph.blocks if not block.frozen)
    macs, dense_macs = graph.macs(graph.choice(keep)), graph.macs(graph.dense)
    share = macs / dense_macs
    return Plan(
        profile="none",
        fingerprint=graph.fingerprint,
        inputs=tuple(InputSpec(shape=shape, dtype=dtype) for shape, dtype in graph.inputs),
        target_fraction=share,
        widths=widths,
        blocks=blocks,
        pools=per_width_pools(widths, blocks),
        importance="none",
        predicted=Prediction(
            basis="documented",
            fraction=share,
            low=share,
            high=share,
            expected_error=None,
            dense_s=None,
            latency_s=None,
            macs=macs,
            dense_macs=dense_macs,
        ),
        proof=Proof(status="given", objective=0.0, bound=0.0, gap=0.0),
    )
