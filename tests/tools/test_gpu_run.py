"""What spends a quarter of an hour on a GPU: steps, limits, records, a dry run of both parts."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("package", "record", "runner", "steps")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of a run."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found = {name: importlib.import_module(f"gpu.{name}") for name in MODULES}
    return SimpleNamespace(**found, report=importlib.import_module("report"))


@pytest.fixture
def run(gpu: SimpleNamespace, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs steps; returns their outcomes by name."""

    def call(
        *steps: Any, seconds: float = 60, slots: int = 2, device: str = "cuda", **options: Any
    ) -> dict[str, Any]:
        setting = gpu.runner.Setting(device, tmp_path / "work", slots, options.get("sanitizer"))
        outcomes: list[Any] = []
        gpu.runner.Runner(setting, seconds).run(steps, outcomes.append)
        return {outcome.step.name: outcome for outcome in outcomes}

    return call


@pytest.fixture
def step(gpu: SimpleNamespace) -> Callable[..., Any]:
    """A step that runs a Python program."""

    def make(name: str, program: str, **options: Any) -> Any:
        command = (*options.pop("before", ()), "{python}", "-c", program)
        return gpu.steps.Step(name, 0, options.pop("limit", 30), command=command, **options)

    return make


def test_steps_pass_fail_and_are_not_available(
    gpu: SimpleNamespace, run: Callable[..., Any], step: Callable[..., Any]
) -> None:
    counts = {"counts": True, "beside": True}
    tool = {"before": ("{sanitizer}", "-m"), "counts": True}
    results = run(
        step("good", "print('3 passed, 1 skipped in 0.10s')", **counts),
        step("bad", "print('1 failed, 2 passed in 0.10s'); raise SystemExit('why')", **counts),
        step("empty", "print('2 skipped in 0.10s')", **counts),
        step("fuzz", "print('17 cases, 40 rows, backend cpu, seed 0')", **counts),
        step("no cases", "print('0 cases, 0 rows, backend cpu, seed 0')", **counts),
        step("build", "print('done')"),
        step("no tool", "raise SystemExit(1)", **tool),
        step("dropped", "print('done')", beside=True),
    )
    assert {name: (r.state, r.summary, r.reason) for name, r in results.items()} == {
        "good": ("passed", "3 passed, 1 skipped", ""),
        "bad": ("FAILED", "1 failed, 2 passed", "exit status 1: why"),
        "empty": ("FAILED", "2 skipped", "nothing ran"),
        "fuzz": ("passed", "17 cases", ""),
        "no cases": ("FAILED", "0 cases", "nothing ran"),
        "build": ("passed", "", ""),
        "no tool": ("not available", "", "compute-sanitizer is not installed"),
        "dropped": ("passed", "", ""),
    }


@pytest.mark.parametrize(
    ("log", "code", "state"),
    [
        ("Error: Device not supported", 1, "not available"),
        ("3 shapes are right", 0, "passed"),
        ("AssertionError", 1, "FAILED"),
        ("Device not supported, but an error was found", 99, "FAILED"),
    ],
)
def test_a_sanitizer_that_refuses_the_machine_is_no_failure(
    log: str, code: int, state: str, run: Callable[..., Any], gpu: SimpleNamespace
) -> None:
    program = f"print({log!r}); raise SystemExit({code})"
    command = ("{sanitizer}", "-c", program)
    made = gpu.steps.Step("memcheck: cuda", 0, 30, command=command)
    (outcome,) = run(made, sanitizer=sys.executable).values()
    assert outcome.state == state


@pytest.mark.parametrize("limit", ["step", "part"])
def test_a_step_that_hangs_costs_its_limit_and_keeps_what_it_recorded(
    limit: str, tmp_path: Path, run: Callable[..., Any], step: Callable[..., Any]
) -> None:
    pid, record = tmp_path / "pid", tmp_path / "work" / "hangs.json"
    program = (
        "import pathlib, subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        f'pathlib.Path({str(record)!r}).write_text(\'{{"rows": [{{"part": "a"}}]}}\')\n'
        "child.wait()"
    )
    start = time.monotonic()
    limits = {"step": (3.0, 60.0), "part": (60.0, 3.0)}[limit]
    hangs, after = step("hangs", program, limit=limits[0]), step("after", "print('here')")
    results = run(hangs, after, seconds=limits[1])
    assert time.monotonic() - start < 20
    assert (results["hangs"].state, results["hangs"].reason) == ("FAILED", "stopped after 3 s")
    assert results["hangs"].record == {"rows": [{"part": "a"}]}
    assert results["after"].state == {"step": "passed", "part": "dropped"}[limit]
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_steps_run_beside_each_other_only_where_nothing_is_timed(
    tmp_path: Path, run: Callable[..., Any], step: Callable[..., Any]
) -> None:
    # Each waits for what the other writes, and so fails alone.
    programs = [
        "import pathlib, time\n"
        f"pathlib.Path({str(tmp_path / mine)!r}).touch()\n"
        "end = time.monotonic() + 10\n"
        f"while not pathlib.Path({str(tmp_path / other)!r}).exists():\n"
        "    time.sleep(0.01)\n"
        "    assert time.monotonic() < end"
        for mine, other in (("a", "b"), ("b", "a"))
    ]
    together = [step(f"step {i}", program, beside=True) for i, program in enumerate(programs)]
    assert {outcome.state for outcome in run(*together).values()} == {"passed"}
    running = tmp_path / "running"
    alone = (
        f"import pathlib, time; path = pathlib.Path({str(running)!r}); path.mkdir()\n"
        "time.sleep(0.5); path.rmdir()"
    )
    results = run(*(step(f"step {i}", alone) for i in range(3)), slots=4)
    assert {outcome.state for outcome in results.values()} == {"passed"}


def test_later_steps_are_dropped_for_lack_of_time(
    gpu: SimpleNamespace, run: Callable[..., Any], step: Callable[..., Any]
) -> None:
    command = ("{python}", "-c", "print('done')")
    long = gpu.steps.Step("long", 100, 200, command=command)
    results = run(step("short", "print('done')"), long, seconds=20)
    assert results["short"].state == "passed"
    assert results["long"].state == "dropped"
    assert results["long"].reason.startswith("takes about 100 s")


def test_a_backend_that_hangs_is_not_measured_and_one_that_is_wrong_is(
    gpu: SimpleNamespace, tmp_path: Path, step: Callable[..., Any]
) -> None:
    runner = gpu.runner.Runner(gpu.runner.Setting("cuda", tmp_path, 3, None), 60)
    steps = (
        step("hangs", "import time; time.sleep(60)", proves="triton", limit=2, beside=True),
        step("wrong", "raise AssertionError('off by 1')", proves="cuda", beside=True),
        step("right", "print('1 passed in 0.1s')", proves="cuda", beside=True),
    )
    runner.run(steps, lambda outcome: None)
    assert runner.without == {"triton"}
    measure = importlib.import_module("gpu.measure")
    result = gpu.report.Result(None, {})
    bench = measure.Bench(torch.device("cpu"), measure.DRY, result, runner.without)
    assert bench.names == ["cuda"]
    assert measure.STEPS["triton_variants"](bench) == []
    assert len(measure.STEPS["cuda_variants"](bench)) == 1


def test_a_step_ends_with_the_run_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, time; sys.path.insert(0, 'benchmarks')\n"
        "from gpu.runner import Process\n"
        f"process = Process(['sleep', '60'], {{}}, pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "import os; print(os.getsid(0) == os.getsid(process.popen.pid))\n"
        "print(os.getpgid(process.popen.pid) == process.popen.pid); process.stop()"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    expected = ["True", "True"] if sys.version_info >= (3, 11) else ["False", "True"]
    assert done.stdout.split() == expected


def test_nothing_runs_without_the_package(
    run: Callable[..., Any], step: Callable[..., Any]
) -> None:
    results = run(step("package", "raise SystemExit('no compiler')", fatal=True), step("next", ""))
    assert results["package"].reason == "exit status 1: no compiler"
    assert (results["next"].state, results["next"].reason) == ("dropped", "package: FAILED")


def test_rows_with_errors_fail_a_step_and_what_is_missing_does_not(gpu: SimpleNamespace) -> None:
    unable = {"rows": [{"note": "not available: no ncu"}, {"note": "not available: no ncu"}]}
    assert gpu.runner.unavailable(unable) == "no ncu"
    assert gpu.runner.unavailable({"rows": [*unable["rows"], {"ms": 1.0}]}) == ""
    assert gpu.runner.unavailable(None) == gpu.runner.unavailable({"rows": []}) == ""


# The record


def outcome(gpu: SimpleNamespace, name: str, state: str, **record: Any) -> Any:
    return gpu.runner.Outcome(gpu.steps.Step(name, 1, 2), state, record=record or None)


def goals(count: int, met: bool) -> list[dict[str, Any]]:
    return [{"what": f"{met} {i}", "value": 1.0, "goal": "at most 2", "met": met}
            for i in range(count)]  # fmt: skip


def test_files_are_few_complete_after_each_step_and_of_one_run(
    gpu: SimpleNamespace, tmp_path: Path
) -> None:
    output, logs = tmp_path / "out", tmp_path / "logs"
    logs.mkdir()
    (logs / "first.log").write_bytes(b"x" * (5 << 20) + b"the end")
    for part in (1, 2, 2):  # a part again
        record = gpu.record.Record(part, output, logs, {"commit": "abc"})
        for i, name in enumerate(("first", "second")):
            found = {"head": {"device": "H"}, "goals": goals(1, True), "not_reached": [name]}
            record.keep(outcome(gpu, name, "passed", rows=[], **found))
            written = json.loads((output / f"part-{part}.json").read_text())
            assert len(written["steps"]) == len(written["goals"]) == i + 1
            assert written["not_reached"] == ["first", "second"][: i + 1]
            assert (written["commit"], written["device"]) == ("abc", "H")
    files = sorted(path.name for path in output.iterdir())
    assert files == [f"part-{n}{end}" for n in (1, 2) for end in ("-logs.tar.gz", ".json", ".txt")]
    assert len(files) <= 8
    with tarfile.open(output / "part-1-logs.tar.gz") as archive:
        (member,) = archive.getmembers()
        content = archive.extractfile(member).read()
    assert len(content) <= gpu.record.LOG_BYTES
    assert content.endswith(b"xthe end")


def test_the_screen_holds_what_failed_and_what_was_missed_first(
    gpu: SimpleNamespace, tmp_path: Path
) -> None:
    record = gpu.record.Record(1, tmp_path, tmp_path, {})
    record.keep(outcome(gpu, "good", "passed", rows=[], goals=goals(70, True)))
    record.keep(outcome(gpu, "bad", "FAILED", rows=[], goals=goals(3, False)))
    lines = record.screen()
    assert len(lines) == gpu.record.SCREEN == 40
    assert lines[0].startswith("FAILED        bad")
    assert [line.split()[0] for line in lines[1:5]] == ["missed"] * 3 + ["met"]
    assert lines[-3] == "... and 37 more lines in the table"
    assert lines[-1] == "part 1: 1 passed, 1 FAILED; 70 of 73 goals met"
    assert record.failed
    table = (tmp_path / "part-1.txt").read_text()
    assert all(f"False {i}" in table for i in range(3))
    assert all(f"True {i}:" in table for i in range(70))


# What the parts consist of


def test_a_part_fits_its_time_and_every_step_stops_within_a_limit(gpu: SimpleNamespace) -> None:
    for part, steps in gpu.steps.PARTS.items():
        usual = [step for step in steps if step.name not in MORE_TIME]
        spent = sum(gpu.steps.estimate(group, 16) for group in gpu.steps.groups(tuple(usual)))
        assert spent <= gpu.steps.SECONDS[part]
        assert len({step.name for step in steps}) == len(steps)
        for step in steps:
            assert bool(step.measure) != bool(step.command)
            assert not (step.measure and step.beside)
            assert step.estimate < step.limit
    for step in gpu.steps.PARTS[1]:
        assert step.limit <= (60 if step.name.startswith("runs") else 150)


# Run only where more seconds are given than a part has by default.
MORE_TIME = {
    "naive eager", "more shapes", "linear, everything", "memcheck: triton", "unusual rows",
    "careful eager", "compiled peers", "first launch captured: cuda",
    "first launch captured: triton", "tests: test_gpu_shards, cuda",
}  # fmt: skip


def test_the_order_is_that_of_what_a_step_is_worth(gpu: SimpleNamespace) -> None:
    order = [step.name for step in gpu.steps.PARTS[1]]
    first = [
        "package",
        "runs: cuda, K=16, few rows",
        "headline",
        "few rows",
        "variants: cuda",
        "linear",
    ]
    first += ["profile", "tests: test_gpu, cuda"]
    assert sorted(first, key=order.index) == first
    order = [step.name for step in gpu.steps.PARTS[2]]
    first = ["family: cuda, bucket", "headline", "family", "memcheck: cuda"]
    first += ["differential: cuda, float32", "fuzz: triton", "family, compiled peers", "shapes"]
    first += ["first launch captured: cuda", "unusual rows", "careful eager", "compiled peers"]
    assert sorted(first, key=order.index) == first
    assert "initcheck: cuda" not in order


def test_every_measurement_of_a_step_is_there(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = importlib.import_module("gpu.measure")
    named = {step.measure for steps in gpu.steps.PARTS.values() for step in steps} - {""}
    assert named == set(measure.STEPS)


def test_the_differential_suite_is_cut_into_pieces_that_hold_tests(gpu: SimpleNamespace) -> None:
    steps = [gpu.steps.differential("triton", dtype) for dtype in gpu.steps.DTYPES]
    choices = [step.command[step.command.index("-k") + 1] for step in steps]
    choices.append("triton and test_nasty")
    *pieces, every = collected("tests/semantics/test_differential.py", *choices)
    chosen: list[str] = []
    for dtype, found in zip(gpu.steps.DTYPES, pieces, strict=True):
        assert all(dtype in name for name in found)
        assert len(found) >= 3 * 13
        chosen += found
    assert len(chosen) == len(set(chosen))
    widths = {name.split("-")[1] for name in chosen if "test_nasty" in name}
    assert widths == {str(k) for k in gpu.steps.DIFFERENTIAL_WIDTHS}
    assert {name for name in every if name.split("-")[1] in widths} <= set(chosen)


def test_pieces_of_triton_s_tests_are_all_of_them_and_each_is_in_one(gpu: SimpleNamespace) -> None:
    words = {step.name: step.command[-1] for step in gpu.steps.triton_tests()}
    assert all(choice.startswith("not cuda and ") for choice in words.values())
    source = (ROOT / "tests" / "kernels" / "test_gpu.py").read_text()
    for name in re.findall(r"^def (test_\w+)\(", source, re.MULTILINE):
        matched = [
            piece
            for piece, choice in words.items()
            if eval(re.sub(r"\b(?!not|and|or)\w+", lambda m, name=name: str(m[0] in name), choice))
        ]
        assert len(matched) == ("cuda" not in name), name


# Prints the names of a file's tests that the words choose, one list after the other.
COLLECT = """
import sys, pytest
for words in sys.argv[2:]:
    print("chosen:", flush=True)
    code = pytest.main(["--collect-only", "-o", "addopts=", "-q", sys.argv[1], "-k", words])
    assert code == 0, code
"""


def collected(file: str, *choices: str) -> list[list[str]]:
    """For each choice of ``-k``, names of the tests that pytest would run on a device."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, file, *choices],
        env=os.environ | {"TRITON_INTERPRET": "1", "OPD_KERNELS_TEST_DEVICE": "cpu"},
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    _, *lists = done.stdout.split("chosen:\n")
    return [[line for line in found.splitlines() if "::" in line] for found in lists]


# The modules


def test_modules_are_used_only_as_long_as_their_sources_are_the_same(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = gpu.package
    monkeypatch.setattr(package, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(package, "VARIANTS", tmp_path / "variants.so")
    monkeypatch.setattr(package, "modules", lambda: {"a": tmp_path / "a.so"})
    monkeypatch.setattr(package, "served", lambda device: f"{device} refused")
    assert "none were brought along" in package.refusal("cuda")
    package.STAMP.write_text(json.dumps({"sources": "other"}))
    assert "have changed" in package.refusal("cuda")
    package.STAMP.write_text(json.dumps({"sources": package.sources()}))
    assert "a.so is missing" in package.refusal("cuda")
    (tmp_path / "a.so").touch()
    package.VARIANTS.touch()
    assert package.refusal("cuda") == "cuda refused"
    monkeypatch.setenv("PATH", "")  # where there is no git
    monkeypatch.setattr(package, "COMMIT", tmp_path / "commit")
    assert package.commit() == "unknown"
    package.COMMIT.write_text("abc\n")
    assert package.commit() == "abc"


def test_a_cache_that_was_brought_along_is_small_and_found_where_it_lies(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.package, "CACHE", tmp_path)
    kernel = tmp_path / "KEY"
    kernel.mkdir()
    names = ["k.cubin", "k.json", "k.ttir", "k.ptx"]
    for name in names:
        (kernel / name).touch()
    group = kernel / "__grp__k.json"
    paths = {name: f"/elsewhere/KEY/{name}" for name in names}
    group.write_text(json.dumps({"child_paths": paths}))
    gpu.package.prune_cache()
    gpu.package.settle_cache()
    assert sorted(path.name for path in kernel.iterdir()) == [group.name, "k.cubin", "k.json"]
    assert json.loads(group.read_text()) == {
        "child_paths": {name: str(kernel / name) for name in ("k.cubin", "k.json")}
    }


def test_what_does_not_serve_the_device_is_told(gpu: SimpleNamespace) -> None:
    assert gpu.package.served("cpu").startswith("cuda does not serve cpu: ")


def test_the_build_is_for_the_gpu_that_is_there(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for capability, name in (((9, 0), "90a"), ((10, 0), "100"), ((8, 6), "86")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert gpu.package.architecture() == name


# The kernels through raw pointers


@pytest.mark.parametrize(
    "broken", ["", "select", "gather", "select_divergence", "entry_divergence", "scatter"]
)
def test_kernels_are_checked_through_raw_pointers(
    broken: str, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import emulated

    if not emulated.POSSIBLE:
        pytest.skip("the kernels are not emulated in this run")
    raw = importlib.import_module("gpu.raw")
    module, memory, device = raw.load("cpu")
    functions = {name: getattr(module, name) for name in dir(module)}
    if broken:
        functions[broken] = lambda *_: None
    loaded = SimpleNamespace(**functions), memory, device
    monkeypatch.setattr(raw, "load", lambda _: loaded)
    if broken:
        with pytest.raises(AssertionError):
            raw.main(["--device", "cpu"])
    else:
        assert raw.main(["--device", "cpu"]) == 0


# A dry run


def dry(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu", "--device", "cpu", "--output", str(folder)]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What both parts wrote and printed, on the CPU."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("gpu")
    found = {}
    for part in (1, 2):
        done = dry(folder, "--part", str(part), "--seconds", "1500", "--commit", "abc123")
        assert done.returncode == 0, done.stdout + done.stderr
        content = json.loads((folder / f"part-{part}.json").read_text())
        found[part] = content | {"printed": done.stdout, "folder": folder}
    return found


def test_both_parts_run_dry_and_nothing_fails(
    dry_runs: dict[int, dict[str, Any]], gpu: SimpleNamespace
) -> None:
    for part, found in dry_runs.items():
        states = {step["step"]: step["state"] for step in found["steps"]}
        expected = {step.name: "passed" for step in gpu.steps.PARTS[part]}
        expected |= {s.name: "not available" for s in gpu.steps.PARTS[part] if s.needs_gpu}
        if "profile" in states:
            expected["profile"] = states["profile"]  # as there is ncu or not
        assert states == expected
        assert [row["error"] for row in found["rows"] if "error" in row] == []
        assert found["not_reached"] == []
        assert (found["commit"], found["part"], found["device"]) == ("abc123", part, "cpu")


def test_a_dry_run_prints_its_plan_first_and_few_lines_last(
    dry_runs: dict[int, dict[str, Any]],
) -> None:
    for part, found in dry_runs.items():
        lines = found["printed"].splitlines()
        assert lines[0] == "    0 s  package, about 10 s"
        assert lines[-1].startswith(f"part {part}: ")
        end = len(lines) - lines.index("") - 1
        assert end <= 40
        assert sum(path.stat().st_size for path in found["folder"].iterdir()) < 8 << 20


def measured(found: dict[str, Any], part: str) -> list[tuple[str, str]]:
    return [(row["backend"], row["measure"]) for row in found["rows"] if row["part"] == part]


YARDSTICKS = [("torch", measure) for measure in ("read", "memset", "copy")]
BACKENDS = ("cuda", "triton")


def of_both(*measures: str) -> list[tuple[str, str]]:
    return [(backend, measure) for backend in BACKENDS for measure in measures]


FULL_HEADS = [
    *(("torch", f"{count}chunked product{s}")
      for count, s in (("", ""), ("three ", "s"), ("four ", "s"))),
    ("torch", "one product"),
    ("peer", "LM head + careful eager"),
    *(("triton", measure) for measure in (
        "score_ids", "exact, mean", "exact, per row", "sampled", "sampled, log-sum-exp given",
    )),
]  # fmt: skip


def test_a_dry_run_measures_everything(dry_runs: dict[int, dict[str, Any]]) -> None:
    first, second = dry_runs.values()
    ours = of_both("forward", "backward", "forward + backward")
    others = of_both("select_topk", "forward, TopK teacher", "in place")
    point = YARDSTICKS + ours
    host = of_both("forward", "backward", "forward operator", "backward operator")
    kinds = ("reverse KL, bucket", "forward KL, truncate", "reverse KL, generalize")
    calls = ("forward", "forward + backward", "in place")
    members = [f"{kind}, {call}" for kind in kinds for call in calls]
    riding = ("topk_rkl with both masses", "select_topk", "select_topk with log-sum-exp")
    peers = ("careful eager", "naive eager", "careful eager, compiled", "naive eager, compiled")
    expected: list[tuple[dict[str, Any], str, Sequence[tuple[str, str]]]] = [
        (first, "headline", (point + others) * 2),
        (first, "few rows", point * 2),
        (first, "host", host),
        (first, "launches", of_both("forward", "backward") * 2),
        (second, "headline", point + others),
        (second, "shapes", point * 3),
        (second, "unusual", of_both("forward", "forward + backward") * 2),
        (second, "family", [*YARDSTICKS[:2], *of_both(*members, *riding)]),
        (second, "full heads", FULL_HEADS),
        (second, "peers", of_both(*peers, *(f"reverse KL, bucket, {peer}" for peer in peers))),
    ]
    for found, part, rows in expected:
        assert sorted(measured(found, part)) == sorted(rows), part
    variants = {row["part"] for row in first["rows"] if row["part"].startswith("variants")}
    assert {"variants, triton forward", "variants, linear"} < variants
    for name in variants:
        names = [measure for _, measure in measured(first, name)]
        assert "product" in names
        assert len(names) == len(set(names)) >= 2


def test_every_time_of_a_dry_run_is_beside_a_check_and_a_yardstick(
    dry_runs: dict[int, dict[str, Any]],
) -> None:
    for row in [row for found in dry_runs.values() for row in found["rows"] if "ms" in row]:
        assert 0 < row["p10"] <= row["ms"] <= row["p90"]
        if row["part"] == "host":
            assert row["host_us"] == pytest.approx(row["ms"] * 1e3)
        elif row["part"].startswith("variants"):
            assert row["times_product"] > 0
        elif row["backend"] in BACKENDS:
            assert row["checked"]["rows"] == row["rows"]
            assert row["checked"]["loss_error"] < 1e-4
        if row["measure"] == "forward" and row["part"] in ("headline", "few rows", "shapes"):
            size = 4 if row["dtype"] == "float32" else 2
            nbytes = row["rows"] * row["vocab"] * size + 40 * row["rows"] * row["k"]
            assert row["bytes"] == nbytes
            assert row["gb_s"] == pytest.approx(nbytes / row["ms"] / 1e6)
            assert row["percent_of_read"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "no such step"), "no step of part 1 has 'no such step' in its name"),
        (("--seconds", "-3"), "--seconds is -3, allowed are numbers above 0"),
        (("--part", "3"), "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = dry(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stdout
    assert list(tmp_path.iterdir()) == []
