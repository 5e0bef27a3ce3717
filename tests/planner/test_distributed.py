"""Several processes: replicas hold the same support, shards add up to the whole, and both equal one process."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import planner
from planner import Plan, attach
from planner.groups import Groups, group
from planner.parallel import unwrapped
from planner.prox import Proximal
from planner.structures import NM, Channel, FilterShape, Rows, Structure, Weight
from profiles.errors import PlanError

from . import nets
from .nets import PIXELS, Sum, conv, looking_trained

STEPS, SHRINKING = 14, 8
INPUTS = (torch.ones(PIXELS),)


def net() -> nn.Module:
    """A net without batch statistics, whose widths (7, 5) two processes do not halve."""
    body = Sum(conv(5, 7), nn.ReLU(), conv(7, 5), nn.BatchNorm2d(5))
    layers = [conv(3, 7), nn.BatchNorm2d(7), nn.ReLU(), conv(7, 5), nn.BatchNorm2d(5), body, nn.Flatten()]
    return looking_trained(nn.Sequential(*layers, nn.Linear(320, 4))).eval()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the global batch of a step, of four images."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, *PIXELS[1:], generator=generator), torch.randn(4, 4, generator=generator)


def optimizers(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    return torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)  # a larger eps forgives sums of another order


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, rank: int = 0, world: int = 1) -> None:
    """Fit random targets, each rank on its share of the batch."""
    for step in range(STEPS):
        x, y = (part.chunk(world)[rank] for part in batch(step))
        optimizer.zero_grad()
        nn.functional.huber_loss(model(x), y).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Narrower widths."""
    plan = planner.plan(net(), INPUTS, nets.anywhere(), latency=0.5)
    assert any(0 < pool.budget < 7 for pool in plan.pools)
    return plan


def alone(plan: Plan, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Train in this process; return the weights and the support."""
    model = net()
    optimizer = optimizers(name, model)
    proximal = attach(plan, model, optimizer, steps=SHRINKING, elementwise="elementwise" in name)
    train(model, optimizer)
    return dict(model.state_dict()), support(proximal)


def support(proximal: Proximal) -> Tensor:
    assert proximal.frozen
    return proximal.state_dict()["kept"].to(torch.uint8)


# --- in each process ----------------------------------------------------------------------------------------------


def work(plan_json: str) -> dict[str, Tensor]:
    """Do everything that needs several processes; tensors are named by the test that looks at them."""
    plan, found = Plan.load(plan_json), {}
    for name, wrapped in (("SGD", True), ("Adam", False)):
        found |= {f"replica {name} {key}": tensor for key, tensor in replica(plan, name, wrapped).items()}
    for name in ("SGD", "Adam", "elementwise Adam"):
        found |= {f"shard {name} {key}": tensor for key, tensor in shard(plan, name).items()}
    for wrapped in (True, False):
        found |= {f"ties {wrapped} {key}": tensor for key, tensor in ties(plan, wrapped).items()}
    mesh = init_device_mesh("cpu", (2,))
    for axis in (0, 1):
        found |= {f"axis {axis} {key}": tensor for key, tensor in on_shards(mesh, axis).items()}
    refusals(mesh)
    return found


def replica(plan: Plan, name: str, wrapped: bool) -> dict[str, Tensor]:
    """Train one replica, attached to the wrapped model or to the one within."""
    model = DistributedDataParallel(net())
    optimizer = optimizers(name, model)
    proximal = attach(plan, model if wrapped else model.module, optimizer, steps=SHRINKING)
    train(model, optimizer, rank=distributed.get_rank(), world=2)
    return {**model.module.state_dict(), "support": support(proximal)}


def ties(plan: Plan, wrapped: bool) -> dict[str, Tensor]:
    """Fix the support of replicas whose groups are all alike, but for a last bit that differs between processes."""
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    proximal = attach(plan, model if wrapped else model.module, optimizer, steps=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            if distributed.get_rank() and parameter.dim() == 4:
                parameter[-2:] += 2e-7
    proximal.step()
    kept = support(proximal)
    return {"support": kept, "nonzero": torch.tensor(proximal.nonzero()), "weight": model.module[0].weight}


def shard(plan: Plan, name: str) -> dict[str, Tensor]:
    """Train one shard and gather the result."""
    model = net()
    graph = plan.graph(model)
    for layer in (model[0], model[5]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizers(name, model)
    with pytest.raises(PlanError, match=r"0.weight is sharded, so the model cannot be traced; make graph = plan.graph"):
        attach(plan, model, optimizer)
    proximal = attach(plan, model, optimizer, steps=SHRINKING, graph=graph, elementwise="elementwise" in name)
    train(model, optimizer, rank=distributed.get_rank(), world=2)
    found = {"support": support(proximal), "nonzero": torch.tensor(proximal.nonzero())}
    for tensor_name, tensor in model.state_dict().items():
        found[tensor_name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    assert isinstance(model.state_dict()["0.weight"], DTensor)
    return found


class Odd(nn.Module):
    """Parameters that two processes split evenly, unevenly, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"one": (1,), "two": (2, 4, 3, 3), "five": (5, 4), "seven": (7, 1, 3, 3)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


STRUCTURES: list[Structure] = [
    Channel("two", 4),
    Channel("five", 4),
    FilterShape("seven", (1, 3, 3)),
    Weight("five", 20),
    NM("two", 72, 2, 4),
    Rows(("seven", "five"), 1, 1),
    Weight("one", 1),
]


def on_shards(mesh: DeviceMesh, axis: int) -> dict[str, Tensor]:
    """Return what groups measure and scale on sharded parameters; gathering one is an error, and so are many sums."""
    model, whole = Odd(), Odd()
    for name, parameter in whole.named_parameters():
        if name != "one" or axis == 0:
            placed = distribute_tensor(parameter.detach(), mesh, [Shard(axis)])
            setattr(model, name, nn.Parameter(placed))
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for gathering in ("full_tensor", "redistribute"):
            patch.setattr(DTensor, gathering, None)
        reduce = planner.groups.all_reduce
        patch.setattr(planner.groups, "all_reduce", lambda *args, **kwargs: calls.append(reduce(*args, **kwargs)))
        found = figures(group(STRUCTURES, model), model)
    assert len(calls) == 3  # norms, sums and sizes, each of all groups at once
    parameters = dict(model.named_parameters())
    return found | {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in parameters.items()}


def figures(groups: Groups, model: nn.Module) -> dict[str, Tensor]:
    """Return norms, sums and sizes, and scale the weights."""
    parameters = dict(model.named_parameters())
    found = {"norms": groups.norms(parameters), "sums": groups.sums(parameters), "sizes": groups.sizes(parameters)}
    groups.scale_(parameters, torch.linspace(0.5, 1, groups.count))
    return found


def refusals(mesh: DeviceMesh) -> None:
    """Placements whose sums would be wrong are refused."""
    model = Odd()
    model.two = nn.Parameter(DTensor.from_local(model.two.detach(), mesh, [Partial()]))
    with pytest.raises(PlanError, match=r"two is placed as \(Partial.*; only Shard and Replicate are supported"):
        group(STRUCTURES, model)
    other = init_device_mesh("cpu", (2, 1))
    model.two = nn.Parameter(distribute_tensor(Odd().two.detach(), mesh, [Shard(0)]))
    model.five = nn.Parameter(distribute_tensor(Odd().five.detach(), other, [Replicate(), Shard(0)]))
    with pytest.raises(PlanError, match="two and five are sharded over different processes; shard all layers over"):
        group(STRUCTURES, model)


def _process(rank: int, world: int, plan_json: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        found = work(plan_json)
        save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, f"{folder}/{rank}.safetensors")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


# --- what they found ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What two processes of one gloo group found, by rank."""
    folder = tmp_path_factory.mktemp("processes")
    plan.save(folder / "plan.json")
    spawn(_process, (2, str(folder / "plan.json"), str(folder)), nprocs=2)  # type: ignore[no-untyped-call]
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


def of(found: list[dict[str, Tensor]], prefix: str) -> list[dict[str, Tensor]]:
    return [{k.removeprefix(prefix): t for k, t in each.items() if k.startswith(prefix)} for each in found]


@pytest.mark.parametrize(("way", "name"), [
    ("replica", "SGD"), ("replica", "Adam"), ("shard", "SGD"), ("shard", "Adam"), ("shard", "elementwise Adam"),
])  # fmt: skip
def test_two_processes_hold_one_support_and_equal_one_process(
    plan: Plan, found: list[dict[str, Tensor]], way: str, name: str
) -> None:
    first, second = of(found, f"{way} {name} ")
    assert all(torch.equal(first[key], second[key]) for key in first)
    weights, kept = alone(plan, name)
    assert torch.equal(first["support"], kept)
    assert 0 < kept.sum() < len(kept)
    assert int(first.get("nonzero", kept.sum())) == int(kept.sum())
    for key, tensor in weights.items():
        torch.testing.assert_close(first[key], tensor, rtol=0, atol=1e-6)
        assert torch.equal(first[key] == 0, tensor == 0)


@pytest.mark.parametrize("wrapped", [True, False])
def test_replicas_that_differ_in_a_last_bit_keep_the_same_groups(
    plan: Plan, found: list[dict[str, Tensor]], wrapped: bool
) -> None:
    first, second = of(found, f"ties {wrapped} ")
    assert not torch.equal(first["weight"], second["weight"]) or not first["weight"][-2:].any()
    assert torch.equal(first["support"], second["support"])
    assert torch.equal(first["weight"] == 0, second["weight"] == 0)
    assert int(first["nonzero"]) == int(second["nonzero"]) == int(first["support"].sum())
    assert 0 < first["support"].sum() < len(first["support"])


@pytest.mark.parametrize("axis", [0, 1])
def test_groups_of_shards_equal_groups_of_the_whole(found: list[dict[str, Tensor]], axis: int) -> None:
    model = Odd()
    expected = {**figures(group(STRUCTURES, model), model), **model.state_dict()}
    for each in of(found, f"axis {axis} "):
        assert each.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(each[key], tensor, rtol=1e-5, atol=1e-6)


# --- wrappers -----------------------------------------------------------------------------------------------------


def test_what_wraps_a_model_is_taken_off() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(compiled) is model
    assert unwrapped(nn.DataParallel(compiled)) is model
    assert unwrapped(model) is model
    assert isinstance(unwrapped(torch.optim.swa_utils.AveragedModel(model)), nn.Sequential)


def test_a_graph_of_another_model_is_refused(plan: Plan) -> None:
    model = net()
    graph = planner.trace(nets.vgg(), INPUTS)
    with pytest.raises(PlanError, match=r"the graph is of another model: \w+, not \w+; use plan.graph\(\)"):
        attach(plan, model, optimizers("SGD", model), graph=graph)
