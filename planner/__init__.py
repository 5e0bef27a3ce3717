"""What to keep: graph, groups, costs, search, WGSEF and training."""

from planner import envelope
from planner.agreement import Agreement
from planner.document import with_depth_budget, with_global_budget
from planner.graph import Graph, trace
from planner.groups import Groups, group
from planner.importance import (
    Importance,
    at_random,
    batchnorm_scale,
    calibrated_cross_entropy,
    magnitude,
    measured,
    supplied,
    taylor,
)
from planner.latency import LatencyTable
from planner.limits import Limits
from planner.pools import with_structures
from planner.prox import Proximal, attach, harden_
from planner.scope import Scope
from planner.search import Problem, plan, problem
from planner.spec import Plan
from planner.structures import Block, Channel, Depth, Embedding, Filter, FilterShape, Head, Hidden, Structure
from planner.tournament import loss_after
from planner.train import Moment, Recipe, accuracy, fit, history, recalibrate_

__all__ = [
    "Agreement",
    "Block",
    "Channel",
    "Depth",
    "Embedding",
    "Filter",
    "FilterShape",
    "Graph",
    "Groups",
    "Head",
    "Hidden",
    "Importance",
    "LatencyTable",
    "Limits",
    "Moment",
    "Plan",
    "Problem",
    "Proximal",
    "Recipe",
    "Scope",
    "Structure",
    "accuracy",
    "at_random",
    "attach",
    "batchnorm_scale",
    "calibrated_cross_entropy",
    "envelope",
    "fit",
    "group",
    "harden_",
    "history",
    "loss_after",
    "magnitude",
    "measured",
    "plan",
    "problem",
    "recalibrate_",
    "supplied",
    "taylor",
    "trace",
    "with_depth_budget",
    "with_global_budget",
    "with_structures",
]
