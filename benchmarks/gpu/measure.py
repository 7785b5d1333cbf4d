"""What the timed steps measure on a GPU, each a function that names its tasks.

Yardsticks: a pure read of the teacher's bytes (the fastest of several kernels and ``torch.amax``:
the read ceiling), memset of the gradient's, a device copy. What is compared is timed in turn, round
by round, by events, with the L2 cache full of something else and the launches queued ahead;
medians. A backend is timed only after its loss and gradient at that shape agreed with float64 on 64
rows. What a backend should reach is in goals.py.
"""

from __future__ import annotations

import datetime
import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import linear
import torch
from calls import (
    Point,
    check_peer,
    forward_backward,
    host_calls,
    member_calls,
    member_loss,
    other_calls,
    ours,
    random_logits,
    reads,
    riding_calls,
    triton,
    unusual_rows,
)
from goals import (
    SORTED_MS,
    judge_family,
    judge_family_peer,
    judge_few_rows,
    judge_full_head,
    judge_host,
    judge_linear_ms,
    judge_peer,
    judge_point,
    judge_unusual,
)
from heads import BOTH, HeadPoint, backward_of, check_ours, inputs, losses, serving
from linear import LinearBench, LinearPlan
from peers import MEMBERS, careful_eager, careful_full, naive_eager, naive_full
from report import Result, kernel_name
from timing import Clock, Name, Run, Runs, Times, spread
from torch import Tensor

import opd_kernels
from gpu import dry, full_heads, package, profiler, variants
from opd_kernels import backends, topk_rkl
from opd_kernels.backends import cuda
from opd_kernels.backends.triton import configs

# Bytes moved by each measure: (tensors of the logits' size, bytes per entry of the support), a
# gathered entry counting as a sector of 32; and the yardsticks that it is compared with.
MODELS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "read": (1, 0, ()),
    "memset": (1, 0, ()),
    "copy": (2, 0, ()),
    "forward": (1, 40, ("read",)),
    "backward": (1, 8, ("memset",)),
    "forward + backward": (2, 48, ("read", "memset")),
    "in place": (2, 48, ("read", "memset")),
    "select_topk": (1, 8, ("read",)),
    "forward, TopK teacher": (0, 48, ()),
    "select_topk with log-sum-exp": (1, 8, ("read",)),
    "topk_rkl with both masses": (2, 60, ("read", "read")),
}
# Members of full softmaxes read the teacher once, the student twice, and write a gradient.
_READS = ("read", "read", "read", "memset")
for _member in MEMBERS:
    MODELS |= {
        f"{_member}, forward": (2, 60, _READS[:2]),
        f"{_member}, forward + backward": (4, 68, _READS),
        f"{_member}, in place": (4, 68, _READS),
    }
GPU_BACKENDS = ("cuda", "triton")
SORTED = "sorted ids"


class Configuration(NamedTuple):
    """What a variant changes in Triton's configuration, and its predicted time in % (NOTES.md)."""

    settings: dict[str, Any]
    predicted: tuple[float, float]


PRODUCT = Configuration({}, (0, 0))
TRITON_VARIANTS = {"product": PRODUCT, "4 stages": Configuration({"STAGES": 4}, (-1, 1))}
LINEAR_VARIANTS = {
    "product": PRODUCT,
    SORTED: Configuration({"SORTED_DOTS": True}, (-5, 1)),
    "dW of 2 warps": Configuration({"WEIGHT_GRAD_WARPS": 2}, (-12, 0)),
    "dW of 4 rows a tile": Configuration({"WEIGHT_GRAD_ROWS": 4}, (-7, 6)),
}


@dataclass(frozen=True)
class Plan:
    """What to measure: the headline shape for each of ``ks``, and around the first one the rest."""

    rows: int
    vocab: int
    ks: tuple[int, ...]
    few_rows: tuple[int, ...]
    shapes: tuple[dict[str, Any], ...]
    more_shapes: tuple[dict[str, Any], ...]
    contents: slice
    warmups: int
    rounds: int
    host_calls: int
    compiler: str
    linear: LinearPlan


FULL = Plan(
    rows=8192,
    vocab=151936,
    ks=(64, 32, 128),
    few_rows=(64, 33),
    shapes=(
        {"k": 1024},
        {"vocab": 151669},
        {"vocab": 262144},
        {"rows": 1024},
        {"dtype": "float32"},
        {"dtype": "float16"},
    ),
    more_shapes=(
        *({"rows": rows} for rows in (8, 128, 256, 512, 32768)),
        *({"k": k} for k in (8, 256, 512)),
        *({"vocab": vocab} for vocab in (32768, 128256)),
    ),
    contents=slice(None),
    warmups=3,
    rounds=30,
    host_calls=300,
    compiler="inductor",
    linear=replace(linear.GPU, rounds=8, compiled=False),
)
DRY = Plan(
    rows=2,
    vocab=1000,
    ks=(8, 4),
    few_rows=(2, 1),
    shapes=({"k": 16}, {"dtype": "float32"}),
    more_shapes=({"vocab": 999},),
    contents=slice(2),
    warmups=1,
    rounds=2,
    host_calls=2,
    compiler="eager",
    linear=replace(linear.SMOKE, vocab=200, fresh=()),
)


class Task(NamedTuple):
    """A part of a step: how it is recorded if it fails, and what is called."""

    part: str
    point: Point | HeadPoint
    label: str
    run: Callable[[], object]


class Bench:
    """Measures at points of a plan and records rows."""

    def __init__(  # noqa: D107
        self, device: torch.device, plan: Plan, result: Result, without: Iterable[str] = ()
    ) -> None:
        self.device, self.plan, self.result = device, plan, result
        self.names = [name for name in GPU_BACKENDS if name not in set(without)]
        self.clock = Clock(device, plan.warmups, plan.rounds)
        self.main = Point(plan.rows, plan.vocab, plan.ks[0])

    def backends(self, point: Point) -> list[str]:
        """GPU backends that serve a point, but for those that are left out."""
        what = self.device, (point.torch_dtype,), point.k
        return [name for name in self.names if backends.load(name).refusal(*what) is None]

    def fits(self, nbytes: int) -> bool:
        """Whether there is as much memory, and 2 GB for other things."""
        if self.device.type != "cuda":
            return True
        return nbytes + 2**31 <= torch.cuda.mem_get_info(self.device)[0]

    def inputs(self, point: Point, tensors: int = 5) -> tuple[Tensor, Tensor]:
        """(student, teacher), if as many tensors of their size fit in memory."""
        need = tensors * point.nbytes
        if not self.fits(need):
            raise MemoryError(f"skipped: {need / 1e9:.0f} GB and 2 more are not free")
        student = random_logits(point, self.device).requires_grad_()
        return student, random_logits(point, self.device)

    def fastest_read(self, teacher: Tensor) -> tuple[Run, dict[str, float]]:
        """(the way of reading that takes least time, milliseconds of all)."""
        runs = reads(teacher)
        times, _ = self.clock.measure(runs)
        found = {name: int(runs[name]()().max()) for name in times}
        right = [name for name in times if found[name] == found["torch", "amax"]]
        ms = {name: statistics.median(times[name]) for name in right}
        return runs[min(ms, key=ms.__getitem__)], {" ".join(name): ms[name] for name in right}

    def point(self, part: str, point: Point, all_calls: bool = False) -> dict[Name, dict[str, Any]]:
        """Yardsticks and every backend, in turn."""
        student, teacher = self.inputs(point)
        buffer = torch.empty_like(teacher)
        read, candidates = self.fastest_read(teacher)
        copy = functools.partial(buffer.copy_, teacher)
        runs: Runs = {
            ("torch", "read"): read,
            ("torch", "memset"): lambda: buffer.zero_,
            ("torch", "copy"): lambda: copy,
        }
        notes: dict[Name, dict[str, Any]] = {("torch", "read"): {"candidates": candidates}}
        for backend in self.backends(point):
            for build in (ours, other_calls) if all_calls else (ours,):
                built, reason = self.clock.attempt(
                    functools.partial(build, student, teacher, point.k, backend)
                )
                if built is None:
                    self.result.add(part, point, "check", backend=backend, error=reason)
                else:
                    runs |= built[0]
                    notes |= {name: {"checked": built[1]} for name in built[0]}
        return self.recorded(part, point, runs, notes)

    def recorded(
        self, part: str, point: Point, runs: Runs, notes: dict[Name, dict[str, Any]]
    ) -> dict[Name, dict[str, Any]]:
        """Times beside the bytes that have to move and beside the yardsticks."""
        rows = {}
        for (backend, measure), values in self.measured(part, point, runs).items():
            tensors, per_entry, yardsticks = MODELS[measure]
            row = spread(values) | notes.get((backend, measure), {})
            row["bytes"] = tensors * point.nbytes + per_entry * point.rows * point.k
            row["gb_s"] = row["bytes"] / row["ms"] / 1e6
            if yardsticks:
                least = sum(rows["torch", name]["ms"] for name in yardsticks)
                row[f"percent_of_{counted(yardsticks)}"] = 100 * least / row["ms"]
            row["peak_bytes"] = self.clock.peak_memory(runs[backend, measure])
            self.result.add(part, point, measure, backend=backend, **row)
            judge_point(self.result, part, point, backend, measure, row)
            rows[backend, measure] = row
        return rows

    def measured(self, part: str, point: Point, runs: Runs) -> Times:
        """Times of the runs; those that fail become rows."""
        times, failed = self.clock.measure(runs)
        for (backend, measure), reason in failed.items():
            self.result.add(part, point, measure, backend=backend, error=reason)
        return times

    def family(self) -> None:
        """Members of full softmaxes, and what rides on the reads that are made anyway, in turn."""
        point = self.main
        student, teacher = self.inputs(point, tensors=12)
        buffer = torch.empty_like(teacher)
        read, _ = self.fastest_read(teacher)
        runs: Runs = {("torch", "read"): read, ("torch", "memset"): lambda: buffer.zero_}
        notes: dict[Name, dict[str, Any]] = {}
        for backend in self.backends(point):
            builds = [functools.partial(member_calls, member=member) for member in MEMBERS]
            for build in (*builds, riding_calls):
                built, reason = self.clock.attempt(
                    functools.partial(build, student, teacher, point.k, backend)
                )
                if built is None:
                    self.result.add("family", point, "check", backend=backend, error=reason)
                else:
                    runs |= built[0]
                    notes |= {name: {"checked": built[1]} for name in built[0]}
        rows = self.recorded("family", point, runs, notes)
        for backend in self.backends(point):
            of = {measure: row for (who, measure), row in rows.items() if who == backend}
            judge_family(self.result, point, backend, of)

    def full_heads(self, point: HeadPoint) -> None:
        """The bucket loss from hidden states, and ``score_ids``, beside products, in turn."""
        for backend in serving(self.names, self.device, point):
            given = full_heads.given(point, self.device, backend)
            checked = full_heads.check(given, backend)
            runs = full_heads.yardsticks(given, self.fits(5 * point.rows * point.vocab * 4))
            runs |= full_heads.ours(given, backend)
            times = self.measured("full heads", point, runs)
            ms = {measure: statistics.median(values) for (_, measure), values in times.items()}
            for (who, measure), values in times.items():
                row = spread(values)
                if who == backend:
                    others = [name for name in full_heads.BESIDE[measure] if name in ms]
                    row["times"] = {name: ms[measure] / ms[name] for name in others}
                    row |= {"checked": checked}
                    judge_full_head(self.result, point, backend, measure, ms[measure])
                row["peak_bytes"] = self.clock.peak_memory(runs[who, measure])
                self.result.add("full heads", point, measure, backend=who, **row)

    def few_rows(self) -> None:
        """Few rows; the smaller number of rows may take no longer than the larger."""
        forward: dict[tuple[str, int], float] = {}
        for rows in self.plan.few_rows:
            found = self.point("few rows", replace(self.main, rows=rows))
            for (backend, measure), row in found.items():
                if measure == "forward":
                    forward[backend, rows] = row["ms"]
        many, few = self.plan.few_rows
        for backend in self.backends(self.main):
            if (backend, many) in forward and (backend, few) in forward:
                ratio = forward[backend, few] / forward[backend, many]
                judge_few_rows(self.result, backend, few, many, ratio)

    def unusual(self, content: str) -> None:
        """Unusual rows beside random ones, in turn."""
        point = self.main
        student, random = self.inputs(point)
        make, options = unusual_rows(point, self.device)[content]
        teacher = make()
        for backend in self.backends(point):
            usual, _ = ours(student, random, point.k, backend)
            unusual, errors = ours(student, teacher, point.k, backend, **options)
            for measure in ("forward", "forward + backward"):
                name, beside = (backend, measure), (backend, "random")
                runs = {name: unusual[name], beside: usual[name]}
                times = self.measured("unusual", point, runs)
                row = spread(times[name]) | {"content": content, "checked": errors}
                row["ratio_to_random"] = row["ms"] / statistics.median(times[beside])
                self.result.add("unusual", point, measure, backend=backend, **row)
                judge_unusual(self.result, backend, content, measure, row["ratio_to_random"])

    def peer(
        self,
        point: Point,
        label: str,
        loss: Callable[..., Tensor],
        compiled: bool,
        member: str = "",
    ) -> None:
        """A peer beside ours, on a quarter of the rows where it does not fit in memory.

        Ours is ``topk_rkl``, or a member of the family by its name.
        """
        if compiled:
            torch.compiler.reset()
            loss = torch.compile(loss, dynamic=False, backend=self.plan.compiler)
            label += ", compiled"
        for scaled in (1, 4):
            _, reason = self.clock.attempt(
                functools.partial(self.beside, point, label, loss, scaled, member)
            )
            if reason is None or "OutOfMemory" not in reason:
                break
        if reason is not None:
            self.result.add("peers", point, label, error=reason)

    def beside(
        self, point: Point, label: str, loss: Callable[..., Tensor], scaled: int, member: str
    ) -> None:
        """Forward and backward of a peer on ``rows / scaled`` rows and ours on all, in turn."""
        own, both = topk_rkl, "forward + backward"
        if member:
            own, both = member_loss(member), f"{member}, {both}"
        student, teacher = self.inputs(point)
        few = student.detach()[: point.rows // scaled].requires_grad_()
        few_teacher = teacher[: len(few)]
        runs: Runs = {
            ("peer", label): forward_backward(
                functools.partial(loss, few, few_teacher, point.k), few
            )
        }
        checked = {}
        for backend in self.backends(point):
            if member:
                mine, errors = member_calls(student, teacher, point.k, backend, member)
            else:
                mine, errors = ours(student, teacher, point.k, backend)
            errors["peer_loss_error"] = check_peer(loss, few_teacher, point.k, backend, own)
            runs[backend, both] = mine[backend, both]
            checked[backend] = errors
        times, failed = self.clock.measure(runs)
        if failed:
            raise RuntimeError("; ".join(failed.values()))
        for backend, errors in checked.items():
            row = {key: ms * scaled for key, ms in spread(times["peer", label]).items()}
            row |= {"scaled": scaled, "checked": errors, "beside": backend}
            mine_ms = statistics.median(times[backend, both])
            row["times_ours"] = row["ms"] / mine_ms
            row["peak_bytes"] = self.clock.peak_memory(runs["peer", label])
            self.result.add("peers", point, label, backend=backend, **row)
            judge = judge_family_peer if member else judge_peer
            judge(self.result, point, backend, label, row["times_ours"])

    def host(self, point: Point) -> None:
        """The host's time in a call: how long Python takes to launch it."""
        student, teacher = self.inputs(point)
        for backend in self.backends(point):
            ours(student, teacher, point.k, backend)  # checked, and compiled
            for (_, measure), run in host_calls(student, teacher, point.k, backend).items():
                self.clock.host(run, self.plan.warmups)
                row = spread(self.clock.host(run, self.plan.host_calls))
                row["host_us"] = row["ms"] * 1e3
                self.result.add("host", point, measure, backend=backend, **row)
                judge_host(self.result, backend, measure, row["host_us"])

    def launches(self, point: Point) -> None:
        """What a call puts on the device."""
        student, teacher = self.inputs(point)
        for backend in self.backends(point):
            runs, _ = ours(student, teacher, point.k, backend)
            for measure in ("forward", "backward"):
                names = self.clock.launches(runs[backend, measure])
                self.result.add("launches", point, measure, backend=backend, launches=names)

    def profile(self, backend: str) -> None:
        """Nsight Compute on a call in a process of its own, or why there is nothing of it."""
        point = self.main
        shape = f"--rows={point.rows}", f"--vocab={point.vocab}", f"--k={point.k}"
        kernels, why = profiler.profile(backend, *shape, f"--device={self.device}")
        for counts in kernels:
            name = kernel_name(counts)
            if "read_bytes" in counts:
                counts["teachers_read"] = counts["read_bytes"] / point.nbytes
            self.result.add("profile", point, name, backend=backend, counters=counts)
        if why:
            note = f"not available: {why}"
            self.result.add("profile", point, "profile", backend=backend, note=note)

    def machine(self) -> None:
        """The device, its clocks as they are, versions; and which backends serve it."""
        self.result.head |= describe(self.device)
        for name in GPU_BACKENDS:
            reason = backends.load(name).refusal(self.device, (torch.bfloat16,), self.main.k)
            self.result.goal(f"{name}: serves the device", float(reason is None), least=1)
            if reason is not None:
                self.result.add("machine", self.main, "check", backend=name, error=reason)

    # Variants

    def cuda_variants(self) -> None:
        """The product and, each different from it in one thing, the variants of its kernels."""
        student, teacher = self.inputs(self.main)
        student.requires_grad_(False)
        built = variants.load(*self.built_variants())
        loss, ids, entries = built.select_divergence("product", student, teacher, self.main.k)
        grad, upstream = torch.empty_like(student), torch.ones_like(loss)

        def forward(name: str) -> tuple[Tensor, ...]:
            return built.select_divergence(name, student, teacher, self.main.k)

        def backward(name: str) -> tuple[Tensor, ...]:
            built.scatter_(name, grad, entries, ids, upstream)
            return (grad,)

        for part, call in (("forward", forward), ("backward", backward)):
            runs: dict[str, Run] = {}
            expected = [result.clone() for result in call("product")]
            for name, variant in variants.VARIANTS.items():
                if name != "product" and variant.part != part:
                    continue
                found, reason = self.clock.attempt(functools.partial(call, name))
                if found and variant.complete and not all(map(torch.equal, found, expected)):
                    reason = "its results are not the product's"
                if reason is None:
                    runs[name] = lambda name=name, call=call: functools.partial(call, name)
                else:
                    row = {"backend": "cuda", "error": reason}
                    self.result.add(f"variants, cuda {part}", self.main, name, **row)
            self.compared(f"variants, cuda {part}", "cuda", runs, variants.VARIANTS)

    def built_variants(self) -> tuple[Any, ...]:
        """The module of the variants, and what else it takes where it is emulated."""
        return (package.VARIANTS,) if self.device.type == "cuda" else dry.variants()

    def triton_variants(self) -> None:
        """The same of Triton's configuration."""
        student, teacher = self.inputs(self.main)
        measure = "forward"
        runs: dict[str, Run] = {}
        for name, (settings, _) in TRITON_VARIANTS.items():
            with configured(settings):
                built, _ = ours(student, teacher, self.main.k, "triton")
            runs[name] = while_configured(settings, built["triton", measure])
        self.compared("variants, triton forward", "triton", runs, TRITON_VARIANTS)

    def linear_variants(self) -> None:
        """The same of the loss of hidden states, with a trained head and random ids."""
        point = self.plan.linear.points()[0]
        given = inputs(point, "uniform ids", self.device)
        runs: dict[str, Run] = {}
        for name, (settings, _) in LINEAR_VARIANTS.items():
            with configured(settings):
                check_ours(given, "triton")
            loss = losses(given, "triton", trained=True)[BOTH]
            runs[name] = while_configured(settings, backward_of(loss, *given.leaves))
        times = self.compared("variants, linear", "triton", runs, LINEAR_VARIANTS, point)
        if SORTED in times:
            judge_linear_ms(self.result, point, f"triton, {SORTED}", times[SORTED], SORTED_MS)

    def compared(
        self,
        part: str,
        backend: str,
        runs: dict[str, Run],
        predictions: Mapping[str, Any],
        point: Point | HeadPoint | None = None,
    ) -> dict[str, float]:
        """Times of the product and its variants in turn; returns medians."""
        point = point or self.main
        named: Runs = {(backend, name): run for name, run in runs.items()}
        times = self.measured(part, point, named)
        base = statistics.median(times[backend, "product"])
        for (_, name), values in times.items():
            row = spread(values)
            row["times_product"] = row["ms"] / base
            row["predicted_percent"] = predictions[name].predicted
            self.result.add(part, point, name, backend=backend, **row)
        return {name: statistics.median(values) for (_, name), values in times.items()}


def counted(yardsticks: tuple[str, ...]) -> str:
    """ "3_reads_and_memset"."""
    names = dict.fromkeys(yardsticks)
    counts = {name: yardsticks.count(name) for name in names}
    return "_and_".join(name if n == 1 else f"{n}_{name}s" for name, n in counts.items())


@contextmanager
def configured(settings: dict[str, Any]) -> Iterator[None]:
    """While the block runs the Triton backend has these settings."""
    before = {name: getattr(configs, name) for name in settings}
    for name, value in settings.items():
        setattr(configs, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(configs, name, value)


def while_configured(settings: dict[str, Any], run: Run) -> Run:
    """The run, its preparation and what is timed, under settings."""

    def prepare() -> Callable[[], None]:
        with configured(settings):
            timed = run()

        def call() -> None:
            with configured(settings):
                timed()

        return call

    return prepare


# The steps: which tasks each one has


def machine(bench: Bench) -> list[Task]:
    return [Task("machine", bench.main, "machine", bench.machine)]


def headline(bench: Bench) -> list[Task]:
    run = functools.partial(bench.point, "headline", bench.main, all_calls=True)
    return [
        Task("headline", bench.main, "headline", run),
        Task("launches", bench.main, "launches", lambda: bench.launches(bench.main)),
    ]


def family(bench: Bench) -> list[Task]:
    return [Task("family", bench.main, "family", bench.family)]


def family_peers(bench: Bench) -> list[Task]:
    return member_peers(bench, compiled=False)


def compiled_family_peers(bench: Bench) -> list[Task]:
    return member_peers(bench, compiled=True)


def other_widths(bench: Bench) -> list[Task]:
    return points(bench, "headline", ({"k": k} for k in bench.plan.ks[1:]), all_calls=True)


def few_rows(bench: Bench) -> list[Task]:
    few = replace(bench.main, rows=bench.plan.few_rows[0])
    return [
        Task("few rows", few, "few rows", bench.few_rows),
        Task("launches", few, "launches", lambda: bench.launches(few)),
    ]


def host(bench: Bench) -> list[Task]:
    few = replace(bench.main, rows=bench.plan.few_rows[0])
    return [Task("host", few, "host", lambda: bench.host(few))]


def cuda_variants(bench: Bench) -> list[Task]:
    return of_backend(bench, "cuda", bench.main, bench.cuda_variants)


def triton_variants(bench: Bench) -> list[Task]:
    return of_backend(bench, "triton", bench.main, bench.triton_variants)


def linear_variants(bench: Bench) -> list[Task]:
    return of_backend(bench, "triton", bench.plan.linear.points()[0], bench.linear_variants)


def of_backend(
    bench: Bench, backend: str, point: Point | HeadPoint, run: Callable[[], object]
) -> list[Task]:
    """The variants of a backend, unless it is left out."""
    return [Task("variants", point, "variants", run)] if backend in bench.names else []


def linear_headline(bench: Bench) -> list[Task]:
    return linear_tasks(bench, lambda step: step.label in ("uniform ids", "shared ids"))


def linear_everything(bench: Bench) -> list[Task]:
    return linear_tasks(bench, lambda step: step.label not in ("uniform ids", "shared ids"))


def linear_tasks(bench: Bench, wanted: Callable[[linear.Step], bool]) -> list[Task]:
    served = LinearBench(bench.device, bench.plan.linear, bench.result, bench.names)
    return [
        Task("linear", step.point, f"linear, {step.label}", step.run)
        for step in served.steps()
        if wanted(step)
    ]


def full_head_losses(bench: Bench) -> list[Task]:
    point = bench.plan.linear.points()[0]
    return [Task("full heads", point, "full heads", lambda: bench.full_heads(point))]


def profile(bench: Bench) -> list[Task]:
    return [
        Task("profile", bench.main, name, functools.partial(bench.profile, name))
        for name in bench.backends(bench.main)
    ]


def unusual(bench: Bench) -> list[Task]:
    contents = list(unusual_rows(replace(bench.main, rows=1), bench.device))
    # Banned ids are what a threshold or a bitmap makes expensive: first.
    contents.sort(key=lambda content: content != "20 banned ids")
    return [
        Task("unusual", bench.main, content, functools.partial(bench.unusual, content))
        for content in contents[bench.plan.contents]
    ]


def careful_eager_step(bench: Bench) -> list[Task]:
    return peers(bench, {"careful eager": careful_eager})


def naive_eager_step(bench: Bench) -> list[Task]:
    return peers(bench, {"naive eager": naive_eager})


def compiled_peers(bench: Bench) -> list[Task]:
    both = {"careful eager": careful_eager, "naive eager": naive_eager}
    return peers(bench, both, compiled=True)


def shapes(bench: Bench) -> list[Task]:
    return points(bench, "shapes", bench.plan.shapes)


def more_shapes(bench: Bench) -> list[Task]:
    return points(bench, "shapes", bench.plan.more_shapes)


def points(
    bench: Bench, part: str, changes: Iterable[dict[str, Any]], all_calls: bool = False
) -> list[Task]:
    """The headline shape with some numbers changed."""
    changed = [replace(bench.main, **change) for change in changes]
    return [
        Task(part, point, part, functools.partial(bench.point, part, point, all_calls))
        for point in changed
    ]


def member_peers(bench: Bench, compiled: bool) -> list[Task]:
    """Careful and naive eager of the first member, which trainers would otherwise write."""
    member = next(iter(MEMBERS))
    divergence, outside = MEMBERS[member]
    tasks = []
    for kind, peer in (("careful eager", careful_full), ("naive eager", naive_full)):
        loss, label = (
            functools.partial(peer, divergence=divergence, outside=outside),
            f"{member}, {kind}",
        )
        run = functools.partial(bench.peer, bench.main, label, loss, compiled, member)
        tasks.append(Task("peers", bench.main, label, run))
    return tasks


def peers(
    bench: Bench, losses: dict[str, Callable[..., Tensor]], compiled: bool = False
) -> list[Task]:
    return [
        Task("peers", bench.main, label,
             functools.partial(bench.peer, bench.main, label, loss, compiled))
        for label, loss in losses.items()
    ]  # fmt: skip


STEPS: dict[str, Callable[[Bench], list[Task]]] = {
    "machine": machine,
    "headline": headline,
    "family": family,
    "family_peers": family_peers,
    "compiled_family_peers": compiled_family_peers,
    "other_widths": other_widths,
    "few_rows": few_rows,
    "host": host,
    "cuda_variants": cuda_variants,
    "triton_variants": triton_variants,
    "linear_headline": linear_headline,
    "linear_variants": linear_variants,
    "linear_everything": linear_everything,
    "full_heads": full_head_losses,
    "profile": profile,
    "unusual": unusual,
    "careful_eager": careful_eager_step,
    "naive_eager": naive_eager_step,
    "compiled_peers": compiled_peers,
    "shapes": shapes,
    "more_shapes": more_shapes,
}


def run(
    step: str, device: torch.device, result: Result, seconds: float, without: Iterable[str] = ()
) -> None:
    """Runs a step's tasks until its time is over; the record is up to date after each."""
    begin = time.monotonic()
    torch.manual_seed(0)
    bench = Bench(device, FULL if device.type == "cuda" else DRY, result, without)
    for task in STEPS[step](bench):
        spent = time.monotonic() - begin
        if spent > 0.8 * seconds:
            result.not_reached.append(f"{task.label}, {task.point}")
        else:
            print(f"{spent:5.1f} s  {task.label}, {task.point}", flush=True)
            bench.clock.release_memory()
            _, reason = bench.clock.attempt(task.run)
            if reason is not None:
                result.add(task.part, task.point, task.label, error=reason)
        result.write()


def describe(device: torch.device) -> dict[str, object]:
    """Device, clocks, clusters, versions and date."""
    about: dict[str, object] = {"device": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about = {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "clusters_of_2_and_more": cuda._properties(device.index or 0)[-1],
            **smi(),
        }
    return {
        **about,
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "python": platform.python_version(),
        "opd_kernels": opd_kernels.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def smi() -> dict[str, str]:
    """What nvidia-smi says of the device, which nobody has set."""
    names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
    names += ("temperature.gpu", "power.limit", "persistence_mode")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {"nvidia-smi": "not available"}
    return dict(zip(names, said.stdout.strip().split(", "), strict=False))
