"""The timer, on a machine whose clock is ours: no test reads real time."""

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import backends
from backends import affinity
from backends.affinity import pinned
from backends.disturbance import disturbed
from backends.environment import Environment
from backends.latency import Latency, centre
from backends.measure import MIN_ROUNDS, SAMPLES_KEPT, Candidate, Clock, Measurement, compare
from profiles.errors import BuildError

US = 1_000
MS = 1_000_000


@dataclass
class Machine:
    """A clock in nanoseconds that moves only when a candidate runs, and a log of what ran."""

    now: int = 0
    stolen: int = 0  # ns in which something else computed
    ran: list[str] = field(default_factory=list)
    load: Callable[[int], float] = lambda now: 1.0

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now, lambda: self.now - self.stolen)

    def candidate(self, label: str, *durations_ns: int) -> Candidate:
        """Return a candidate whose runs last `durations_ns` in turn, times the load of the machine."""
        durations = cycle(durations_ns)

        def run() -> None:
            self.ran.append(label)
            self.now += round(next(durations) * self.load(self.now))

        return Candidate(label, (run,), runtime="fake", runtime_version="1")


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "_SAMPLE_S", 0.0)


def test_latency_is_in_seconds_and_matches_the_runs() -> None:
    machine = Machine()
    (found,) = compare([machine.candidate("a", 2 * MS)], clock=machine.clock)
    assert found.latency_s.p50 == pytest.approx(2e-3)
    assert (found.latency_s.min, found.latency_s.mean, found.latency_s.p99) == pytest.approx((2e-3, 2e-3, 2e-3))
    assert found.latency_s.ci95 == pytest.approx((2e-3, 2e-3))
    assert found.rounds == len(found.round_medians_s) == 33


def test_the_median_ignores_what_the_mean_does_not() -> None:
    machine = Machine()
    (found,) = compare([machine.candidate("a", MS, MS, MS, 9 * MS)], clock=machine.clock)
    assert found.latency_s.p50 == pytest.approx(1e-3)
    assert found.latency_s.p99 == pytest.approx(9e-3)
    assert 2.5e-3 < found.latency_s.mean < 3.5e-3


def test_percentiles_are_of_all_runs_and_the_median_of_the_round_medians() -> None:
    samples = np.random.default_rng(0).lognormal(size=(40, 50))
    medians = np.median(samples, axis=1)
    found = Latency.of(samples.ravel(), medians)
    assert found.p50 == np.median(medians)
    assert (found.p90, found.p99) == tuple(np.percentile(samples, (90, 99)))
    assert (found.min, found.mean) == (samples.min(), pytest.approx(samples.mean()))
    assert found.ci95[0] < found.p50 < found.ci95[1]


@pytest.mark.parametrize("run_ns", [20 * US, 300 * US, 4 * MS, 14 * MS])
@pytest.mark.parametrize("seconds", [0.1, 0.2, 1.0, 3.0])
def test_a_block_lasts_20_to_40_ms_and_all_blocks_the_seconds_asked_for(run_ns: int, seconds: float) -> None:
    machine = Machine()
    (found,) = compare([machine.candidate("a", run_ns)], seconds=seconds, clock=machine.clock)
    block_s = found.runs / found.rounds * run_ns * 1e-9
    half_a_run_s = run_ns * 0.5e-9
    assert 0.02 - half_a_run_s <= block_s <= 0.04 + half_a_run_s
    assert found.runs * run_ns * 1e-9 == pytest.approx(seconds, rel=0.45)


def test_a_slow_candidate_runs_few_times_and_a_fast_one_as_long() -> None:
    machine = Machine()
    slow, fast = compare(
        [machine.candidate("slow", 1000 * MS), machine.candidate("fast", MS)], seconds=2.0, clock=machine.clock
    )
    assert (slow.rounds, slow.runs) == (MIN_ROUNDS, MIN_ROUNDS)
    assert fast.runs * MS * 1e-9 == pytest.approx(2.0)


def test_every_round_runs_every_candidate_once_in_an_order_that_varies() -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        machine = Machine()
        candidates = [machine.candidate(label, MS) for label in "abcd"]
        seen: list[str] = []
        compare(candidates, rounds=24, seed=seed, clock=machine.clock, progress=lambda *_: seen.append(machine.ran[-1]))
        return list(zip(*[iter(seen)] * 4, strict=True))

    rounds = order(0)
    assert len(rounds) == 24
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len(set(rounds)) > 8  # of 24 orders
    assert all(Counter(each[0] for each in rounds)[label] for label in "abcd")
    assert order(0) == rounds
    assert order(1) != rounds


def test_progress_counts_blocks_and_is_not_timed() -> None:
    machine = Machine()
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        machine.now += 1000 * MS

    found = compare([machine.candidate(label, MS) for label in "ab"], rounds=7, progress=progress, clock=machine.clock)
    assert calls == [(done, 14) for done in range(1, 15)]
    assert [each.latency_s.p99 for each in found] == pytest.approx([1e-3, 1e-3])


def test_warm_up_lasts_until_the_runs_are_stable() -> None:
    machine = Machine()
    machine.load = lambda now: max(1.0, 3.0 - now / (100 * MS))  # a clock that speeds up for 0.2 s
    (found,) = compare([machine.candidate("a", MS)], clock=machine.clock)
    assert found.latency_s.p90 < 1.3e-3
    assert found.warmup_runs > 50

    steady = Machine()
    (found,) = compare([steady.candidate("a", MS)], clock=steady.clock)
    assert found.warmup_runs == 1 + 10 + 10


def test_warm_up_gives_up_after_as_long_as_the_measurement(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    generator = np.random.default_rng(0)
    machine.load = lambda now: float(2 ** generator.uniform(-4, 4))
    with caplog.at_level("INFO", logger="backends.measure"):
        (found,) = compare([machine.candidate("wild", 11 * MS)], seconds=0.05, clock=machine.clock)
    assert "wild: not stable" in caplog.text
    assert found.warmup_runs < 12


def test_a_clock_too_coarse_to_see_a_run_does_not_hang() -> None:
    machine = Machine()
    (found,) = compare([machine.candidate("nothing", 0)], seconds=1e-6, clock=machine.clock)
    assert found.latency_s.p50 == pytest.approx(1e-9)


def test_the_garbage_collector_is_off_while_a_run_is_timed_and_on_again_after() -> None:
    machine, states = Machine(), []
    inner = machine.candidate("a", MS)

    def watched() -> None:
        states.append(gc.isenabled())
        inner.runs[0]()

    spy = Candidate("a", (watched,), runtime="fake", runtime_version="1")
    (found,) = compare([spy], rounds=5, clock=machine.clock)
    assert states.count(True) == 1 + 5  # the cold run, and the untimed first run of each block
    assert states.count(False) == found.runs + found.warmup_runs - 1
    assert gc.isenabled()


def test_a_failing_run_leaves_collector_and_cores_as_they_were() -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    before = affinity._allowed()
    with pytest.raises(RuntimeError, match="broken"):
        compare([Candidate("a", (fail,), runtime="fake", runtime_version="1")])
    assert gc.isenabled()
    assert affinity._allowed() == before


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ("", {}, "at least one candidate"),
        ("aa", {}, "labels must differ"),
        ("a", {"seconds": 0.0}, "must be positive"),
        ("a", {"rounds": 0}, "must be positive"),
    ],
)
def test_a_comparison_of_nothing_is_refused(labels: str, settings: dict[str, float], message: str) -> None:
    machine = Machine()
    with pytest.raises(ValueError, match=message):
        compare([machine.candidate(label, MS) for label in labels], clock=machine.clock, **settings)


def test_few_samples_are_kept_but_all_are_counted() -> None:
    machine = Machine()
    (found,) = compare([machine.candidate("a", 100 * US)], clock=machine.clock)
    assert found.runs > 9 * SAMPLES_KEPT
    assert len(found.samples_s) == SAMPLES_KEPT
    (short,) = compare([machine.candidate("a", 9 * MS)], seconds=0.1, clock=machine.clock)
    assert len(short.samples_s) == short.runs


def test_a_measurement_survives_json() -> None:
    machine = Machine()
    (found,) = compare([machine.candidate("a", MS)], clock=machine.clock)
    assert Measurement.model_validate_json(found.model_dump_json()) == found
    assert found.environment.torch == torch.__version__
    assert found.environment.date.tzinfo is not None


def paired(a_s: np.ndarray, b_s: np.ndarray) -> tuple[Measurement, Measurement]:
    """Return two measurements of one comparison with these round medians."""
    environment = Environment.read()

    def measured(label: str, medians_s: np.ndarray) -> Measurement:
        values = tuple(medians_s.tolist())
        return Measurement(
            label=label,
            runtime="fake",
            runtime_version="1",
            artifact_sha256=None,
            threads=1,
            runs=len(values),
            rounds=len(values),
            warmup_runs=0,
            latency_s=Latency.of(medians_s, medians_s),
            round_medians_s=values,
            samples_s=values,
            environment=environment,
        )

    return measured("a", a_s), measured("b", b_s)


def test_a_ratio_is_free_of_the_drift_that_both_share() -> None:
    drift = np.random.default_rng(0).uniform(1, 4, size=33)
    found = backends.ratio(*paired(2e-3 * drift, 1e-3 * drift))
    assert found.value == pytest.approx(2.0)
    assert found.ci95 == pytest.approx((2.0, 2.0))


def test_a_measured_ratio_is_free_of_load_that_changes_between_rounds() -> None:
    machine = Machine()
    machine.load = lambda now: 1.0 + (now // (200 * MS)) % 3  # slower and faster in turns, longer than a round
    a, b = compare([machine.candidate("a", 3 * MS), machine.candidate("b", MS)], seconds=3.0, clock=machine.clock)
    found = backends.ratio(a, b)
    assert found.value == pytest.approx(3.0)
    assert found.ci95 == pytest.approx((3.0, 3.0), rel=0.01)
    assert a.latency_s.p99 > 1.5 * a.latency_s.min


def test_bootstrap_intervals_contain_the_truth_about_as_often_as_they_claim() -> None:
    generator = np.random.default_rng(0)
    hits = Counter[str]()
    for _ in range(100):
        drift = generator.lognormal(sigma=0.3, size=31)
        a, b = paired(
            1.5e-3 * drift * generator.lognormal(sigma=0.05, size=31),
            1.0e-3 * drift * generator.lognormal(sigma=0.05, size=31),
        )
        low, high = backends.ratio(a, b).ci95
        hits["ratio"] += low <= 1.5 <= high
        hits["median"] += b.latency_s.ci95[0] <= 1e-3 <= b.latency_s.ci95[1]
        assert high - low < 0.2
    assert 88 <= hits["ratio"] <= 100
    assert 88 <= hits["median"] <= 100


def test_a_disturbed_round_is_measured_again_and_counted() -> None:
    machine = Machine()
    machine.load = lambda now: 2.0 if 300 * MS < now < 500 * MS else 1.0  # once, for a fifth of a second
    a, b = compare([machine.candidate("a", 3 * MS), machine.candidate("b", MS)], seconds=1.0, clock=machine.clock)
    assert (a.disturbed_rounds, b.disturbed_rounds) == (0, 0)
    assert 0 < a.repeated_rounds == b.repeated_rounds < a.rounds
    assert max(a.round_medians_s) == pytest.approx(3e-3)
    assert max(b.round_medians_s) == pytest.approx(1e-3)


def test_what_stays_disturbed_is_marked_after_as_many_rounds_again() -> None:
    machine, dice = Machine(), np.random.default_rng(0)
    loads = [float(2 ** dice.uniform(-1, 1)) for _ in range(1000)]
    machine.load = lambda now: loads[now // (33 * MS) % 1000]
    (found,) = compare([machine.candidate("a", MS)], seconds=1.0, clock=machine.clock)
    assert found.repeated_rounds == found.rounds == 33
    assert found.disturbed_rounds > 7
    assert found.remark.startswith(f"{found.disturbed_rounds} of 33 rounds were disturbed")


def test_rounds_in_which_the_process_lost_its_core_are_disturbed() -> None:
    relative, busy = np.ones((9, 2)), np.ones((9, 2))
    busy[4, 1] = 0.8
    assert disturbed(relative, busy).nonzero()[0].tolist() == [4]
    relative[6] = (1.2, 1.2)
    relative[7] = (1.15, 0.87)  # one up, one down: noise of theirs, not of the machine
    assert disturbed(relative, busy).nonzero()[0].tolist() == [4, 6]


def test_a_load_that_lasts_all_the_while_shows_in_the_share_of_cpu_time() -> None:
    machine = Machine()

    def run() -> None:
        machine.now += 2 * MS
        machine.stolen += MS

    (found,) = compare([Candidate("a", (run,), "fake", "1")], clock=machine.clock)
    assert found.cpu_share == pytest.approx(0.5)
    assert found.remark == "the process had its core for 50% of the time"
    assert found.disturbed_rounds == 0
    (alone,) = compare([machine.candidate("b", MS)], clock=machine.clock)
    assert (alone.cpu_share, alone.remark) == (pytest.approx(1.0), "")


def test_instances_run_in_turns_and_their_difference_is_in_the_interval() -> None:
    machine = Machine()
    fast, slow = machine.candidate("fast", 95 * US * 10), machine.candidate("slow", 105 * US * 10)
    both = Candidate("both", (*fast.runs, *slow.runs), runtime="fake", runtime_version="1")
    (found,) = compare([both], seconds=2.0, clock=machine.clock)
    assert found.instance_medians_s == pytest.approx((0.95e-3, 1.05e-3))
    assert found.latency_s.p50 == pytest.approx(np.sqrt(0.95 * 1.05) * 1e-3)
    low, high = found.latency_s.ci95
    assert low < 0.95e-3 < 1.05e-3 < high
    assert found.disturbed_rounds == 0


@pytest.mark.parametrize(
    ("instances", "between", "within"),
    [(5, 0.03, 0.02), (5, 0.0, 0.05), (5, 0.05, 0.002), (2, 0.03, 0.02), (3, 0.02, 0.05), (8, 0.02, 0.02)],
)
def test_the_interval_of_a_ratio_holds_the_truth_in_95_of_100_comparisons(
    instances: int, between: float, within: float
) -> None:
    comparisons, turns = 400, 7
    generator = np.random.default_rng(instances)

    def side() -> np.ndarray:  # the logarithms of round medians (comparisons, turns, instances), but for the drift
        compiled = generator.normal(scale=between, size=(comparisons, 1, instances))
        return compiled + generator.normal(scale=within, size=(comparisons, turns, instances))

    truth = 1.5
    paired = truth * np.exp(side() - side()).reshape(comparisons, -1)  # (comparisons, rounds)
    intervals = np.array([centre(rounds, instances=instances)[1] for rounds in paired])
    held = ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean()
    assert 0.92 <= held <= 0.98  # 95 % -+ 3 standard errors
    if between > within:  # what rounds alone say is too narrow where compilations differ
        alone = np.array([centre(rounds)[1] for rounds in paired[:100]])
        assert ((alone[:, 0] <= truth) & (truth <= alone[:, 1])).mean() < 0.85


def test_the_interval_of_a_latency_holds_the_truth_as_often() -> None:
    generator = np.random.default_rng(1)
    compiled = generator.normal(scale=0.03, size=(400, 1, 5))
    rounds = 1e-3 * np.exp(compiled + generator.normal(scale=0.03, size=(400, 7, 5))).reshape(400, -1)
    intervals = np.array([Latency.of(each, each, instances=5).ci95 for each in rounds])
    assert 0.92 <= ((intervals[:, 0] <= 1e-3) & (intervals[:, 1] >= 1e-3)).mean() <= 0.98


def test_a_ratio_counts_instances_not_rounds() -> None:
    """Of two measurements of five instances whose rounds agree, and of reports of an older version without any."""
    compiled = np.tile([1.0, 1.02, 0.98, 1.01, 0.99], 7)
    a, b = paired(1e-3 * compiled, 1e-3 * np.ones(35))
    assert backends.ratio(a, b).ci95 == pytest.approx((0.99, 1.01))  # as if 35 compilations had been drawn
    several = {"instance_medians_s": (1e-3,) * 5}
    new = backends.ratio(a.model_copy(update=several), b.model_copy(update=several))
    logs = np.log([1.0, 1.02, 0.98, 1.01, 0.99])
    half = 2.776 * logs.std(ddof=1) / np.sqrt(5)  # t of 4 degrees of freedom
    assert new.ci95 == pytest.approx((np.exp(logs.mean() - half), np.exp(logs.mean() + half)), rel=1e-4)
    inverse = backends.ratio(b.model_copy(update=several), a.model_copy(update=several))
    assert inverse.value * new.value == pytest.approx(1.0)
    assert inverse.ci95[0] * new.ci95[1] == pytest.approx(1.0)


def test_every_instance_of_one_runs_beside_the_same_of_the_other() -> None:
    machine = Machine()
    runs = {name: tuple(machine.candidate(f"{name}{i}", MS).runs[0] for i in range(3)) for name in "ab"}
    candidates = [Candidate(name, own, runtime="fake", runtime_version="1") for name, own in runs.items()]
    seen: list[str] = []
    compare(candidates, rounds=9, clock=machine.clock, progress=lambda *_: seen.append(machine.ran[-1]))
    assert all(one[1] == other[1] for one, other in zip(seen[::2], seen[1::2], strict=True))
    odd = Candidate("odd", runs["b"][:2], runtime="fake", runtime_version="1")
    with pytest.raises(ValueError, match=r"have \[2, 3\] instances; open all equally often, or once"):
        compare([candidates[0], odd], clock=machine.clock)
    compare([candidates[0], machine.candidate("once", MS)], rounds=3, clock=machine.clock)


def test_a_report_of_before_is_read() -> None:
    machine = Machine()
    (found,) = compare([machine.candidate("a", MS)], clock=machine.clock)
    new = {"instance_medians_s", "disturbed_rounds", "repeated_rounds", "cpu_share"}
    old = Measurement.model_validate_json(found.model_dump_json(exclude=new))
    assert old.latency_s == found.latency_s
    assert backends.ratio(old, found).value == pytest.approx(1.0)


def test_a_ratio_of_separate_measurements_is_refused() -> None:
    (a, _), (_, b) = paired(np.ones(5), np.ones(5)), paired(np.ones(5), np.ones(5))
    with pytest.raises(BuildError, match="measure both in one compare"):
        backends.ratio(a, b)


needs_two_cores = pytest.mark.skipif(len(affinity._allowed()) < 2, reason="pinning needs Linux and two cores")


@needs_two_cores
def test_pinning_holds_old_and_new_threads_and_frees_all_of_them() -> None:
    before = os.sched_getaffinity(0)
    masks: dict[str, set[int]] = {}
    inside, freed = threading.Barrier(3, timeout=30), threading.Event()

    def worker(name: str) -> None:
        inside.wait()
        masks[f"{name} inside"] = os.sched_getaffinity(0)
        inside.wait()
        freed.wait(30)
        masks[f"{name} after"] = os.sched_getaffinity(0)

    workers = [threading.Thread(target=worker, args=(name,)) for name in ("old", "new")]
    workers[0].start()
    with pinned(1) as cores:
        assert len(cores) == 1
        assert os.sched_getaffinity(0) == cores
        workers[1].start()
        inside.wait()
        inside.wait()
    freed.set()
    for thread in workers:
        thread.join(30)
    assert os.sched_getaffinity(0) == before
    assert masks == {"old inside": cores, "new inside": cores, "old after": before, "new after": before}


@needs_two_cores
def test_the_idlest_core_is_chosen_and_one_thread_of_each_core_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([{0: 0, 1: 0, 2: 0, 3: 0}, {0: 5, 1: 5, 2: 1, 3: 0}])
    monkeypatch.setattr(affinity, "_idle_ticks", lambda: next(ticks))
    monkeypatch.setattr(affinity, "_siblings", lambda cpu: f"{cpu % 2}")  # 0 with 2, 1 with 3
    assert affinity._by_idleness(frozenset(range(4))) == [1, 0, 2, 3]


def test_without_a_spare_core_nothing_is_pinned() -> None:
    allowed = affinity._allowed()
    with pinned(len(allowed) + 1) as cores:
        assert cores == allowed == affinity._allowed()


@needs_two_cores
def test_a_comparison_records_the_cores_that_it_used() -> None:
    machine = Machine()
    (found,) = compare([machine.candidate("a", MS)], clock=machine.clock)
    assert len(found.environment.cores_used) == 1
    assert len(affinity._allowed()) > 1


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "pytorch"])
def test_a_measurement_says_what_was_measured(name: str, tmp_path: Path) -> None:
    if name != "pytorch":
        pytest.importorskip(name)
    runtime, model, inputs = backends.load(name), nn.Linear(3, 2), (torch.zeros(1, 3),)
    artifact = runtime.build(model, inputs, None, tmp_path / "model.bin")
    found = backends.measure(runtime, artifact, inputs, seconds=0.01, model=model)
    assert (found.runtime, found.runtime_version, found.artifact_sha256) == (name, runtime.version(), artifact.sha256)
    assert (found.threads, found.label) == (1, artifact.path)
    assert MIN_ROUNDS <= found.rounds < MIN_ROUNDS + runtime.INSTANCES
    assert len(found.instance_medians_s) == runtime.INSTANCES
    with pytest.raises(BuildError, match="was built for"):
        backends.measure(runtime, artifact, (torch.zeros(2, 3),), model=model)
