"""What each backend should reach, and what was reached beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from report import Result

# How many times as long as random rows others may take, by what they hold.
UNUSUAL_RATIO = 1.05
UNUSUAL_RATIOS = {"20 banned ids": 1.1}


@dataclass(frozen=True)
class Goals:
    """Of one backend; None where there is no goal."""

    percent: float  # of the yardsticks' speed, at the headline shapes
    peers: dict[str, float]  # how many times as long peers take
    few_rows_percent: float | None = None  # of the read ceiling
    widest_percent: float | None = None  # of the read ceiling, at K = 1024
    host_us: float | None = None  # of the host in a call
    # Of members of full softmaxes: % of their yardsticks, and how many times as long peers take.
    family_percent: float = 88
    family_peers: dict[str, float] = field(
        default_factory=lambda: {"careful eager": 5, "naive eager": 10, "compiled": 4}
    )


GOALS = {
    "cuda": Goals(
        percent=93,
        peers={"careful eager": 8, "naive eager": 20},
        few_rows_percent=65,
        widest_percent=75,
        host_us=25,
    ),
    "triton": Goals(percent=88, peers={"careful eager": 5, "naive eager": 15}),
}
WIDEST = 1024
# How many times as long as two reads `topk_rkl` may take with both masses, and as long as without
# it a selection with the teacher's log-sum-exp.
MASSES_RATIO, LOGSUMEXP_RATIO = 1.15, 1.08
# The shape whose few rows are judged by the read ceiling.
FEW_ROWS = 64

# Of `linear_topk_rkl`, by device: how many times as long something takes at a K.
LINEAR_GOALS: dict[str, dict[tuple[str, int], float]] = {
    "cpu": {
        ("LM head + careful eager, trained", 32): 10,
        ("LM head + careful eager, frozen", 32): 20,
    },
    "cuda": {("LM head, trained", 64): 7, ("LM head, trained", 32): 10},
}
# Milliseconds on an H100, by K: forward and backward with a trained head.
LINEAR_ROWS, MINE = 8192, "forward + backward, trained"
LINEAR_MS = {64: 5.2, 32: 2.9}
SORTED_MS = {64: 4.2}  # with the forward in the order of sorted ids
# The same of full softmaxes from hidden states at K = 64, as NOTES.md predicts it. The exact mean
# is 47 and what adding up the head's gradient in float32 costs, 17.
FULL_HEAD_MS = {
    "score_ids": 16,
    "sampled": 20,
    "sampled, log-sum-exp given": 5.2,
    "exact, per row": 63,
    "exact, mean": 64,
}
# Of a teacher in process to its matrix product and the student's side alone.
TEACHER_RATIO = 1.25


def judge_point(
    result: Result, part: str, point: Any, backend: str, measure: str, row: dict[str, Any]
) -> None:
    """Bandwidth and memory at a shape."""
    goals = GOALS.get(backend)
    if goals is None:
        return
    ceiling = {
        "headline": goals.percent,
        "few rows": goals.few_rows_percent if point.rows == FEW_ROWS else None,
        "shapes": goals.widest_percent if point.k == WIDEST else None,
        "family": None,  # by judge_family
    }[part]
    what = f"{backend}, {point.rows} rows, K={point.k}: {measure}"
    if measure == "forward" and ceiling is not None:
        result.goal(f"{what}, % of the read ceiling", row["percent_of_read"], least=ceiling)
    if (part, measure) == ("headline", "forward") and row["peak_bytes"] is not None:
        most = 12 * point.rows * point.k + 0.05 * point.nbytes
        result.goal(f"{what}, extra MB", row["peak_bytes"] / 1e6, most=most / 1e6)
    if (part, measure) == ("headline", "forward + backward"):
        percent = row["percent_of_read_and_memset"]
        result.goal(f"{what}, % of read + memset", percent, least=goals.percent)


def judge_family(result: Result, point: Any, backend: str, rows: dict[str, dict[str, Any]]) -> None:
    """Members of full softmaxes beside their reads and writes, and what rides on these."""
    goals = GOALS[backend]
    for measure, row in rows.items():
        what = f"{backend}, K={point.k}: {measure}"
        percent = [name for name in row if name.startswith("percent_of_")]
        if ", " in measure and not measure.endswith("in place"):
            of = percent[0].removeprefix("percent_of_").replace("_", " ")
            result.goal(f"{what}, % of {of}", row[percent[0]], least=goals.family_percent)
        if measure.endswith("forward + backward") and row["peak_bytes"] is not None:
            most = 16 * point.rows * point.k + 64 * point.rows + point.nbytes  # and the gradient
            result.goal(f"{what}, MB", row["peak_bytes"] / 1e6, most=most / 1e6)
        if measure == "topk_rkl with both masses":
            result.goal(f"{what} / 2 reads", 100 / row[percent[0]], most=MASSES_RATIO)
    plain, more = rows.get("select_topk"), rows.get("select_topk with log-sum-exp")
    if plain and more:
        what = f"{backend}, K={point.k}: select_topk with log-sum-exp / without"
        result.goal(what, more["ms"] / plain["ms"], most=LOGSUMEXP_RATIO)


def judge_family_peer(result: Result, point: Any, backend: str, label: str, ratio: float) -> None:
    """A peer of a member; compiled, the better of the two counts, so each is judged."""
    goals = GOALS[backend].family_peers
    kind = "compiled" if label.endswith("compiled") else label.split(", ")[-1]
    result.goal(f"{backend}, K={point.k}: {label} / ours", ratio, least=goals[kind])


def judge_few_rows(result: Result, backend: str, few: int, many: int, ratio: float) -> None:
    """Fewer rows beside more: a wave of clusters too many would show."""
    if GOALS[backend].few_rows_percent is not None:
        result.goal(f"{backend}: forward, {few} rows / {many} rows", ratio, most=1)


def judge_unusual(result: Result, backend: str, content: str, measure: str, ratio: float) -> None:
    """The time of unusual rows to that of random ones."""
    what = f"{backend}, {content}: {measure} / random rows"
    result.goal(what, ratio, most=UNUSUAL_RATIOS.get(content, UNUSUAL_RATIO))


def judge_peer(result: Result, point: Any, backend: str, label: str, ratio: float) -> None:
    """A peer's time to the backend's."""
    if backend in GOALS and label in GOALS[backend].peers:
        what = f"{backend}, K={point.k}: {label} / ours"
        result.goal(what, ratio, least=GOALS[backend].peers[label])


def judge_host(result: Result, backend: str, measure: str, host_us: float) -> None:
    """The host's time in a call of the public functions."""
    if backend in GOALS and measure in ("forward", "backward"):
        most = GOALS[backend].host_us
        if most is not None:
            result.goal(f"{backend}: {measure}, us on the host", host_us, most=most)


def judge_linear(
    result: Result, device: str, point: Any, who: str, rows: dict[str, dict[str, Any]]
) -> None:
    """Times at a headline shape, of measures with a trained or a frozen head.

    A gradient of the head that is allocated anew may cost what a memset of it does.
    """
    for (measure, k), least in LINEAR_GOALS[device].items():
        if k != point.k or measure not in rows:
            continue
        row, what = rows[measure], f"{who}, K={point.k}: {measure} / ours"
        fresh = rows.get("memset of dW, fresh")
        if fresh is not None and measure.endswith("trained"):
            what += f" ({least:g} and a memset of a fresh dW)"
            least = row["ms"] / (row["ms"] / least + fresh["ms"])
        result.goal(what, row["times_ours"], least=least)
    if device == "cuda" and MINE in rows:
        judge_linear_ms(result, point, f"{who}, {MINE}", rows[MINE]["ms"])


def judge_linear_ms(
    result: Result, point: Any, who: str, ms: float, goals: dict[int, float] = LINEAR_MS
) -> None:
    """The time itself, whatever it is beside."""
    if point.k in goals and point.rows == LINEAR_ROWS:
        result.goal(f"{who}, K={point.k}: ms (H100)", ms, most=goals[point.k])


def judge_full_head(result: Result, point: Any, backend: str, measure: str, ms: float) -> None:
    """Full softmaxes from hidden states beside their prediction."""
    judge_linear_ms(result, point, f"{backend}, {measure}", ms, {64: FULL_HEAD_MS[measure]})


def judge_linear_memory(result: Result, point: Any, who: str, row: dict[str, Any]) -> None:
    """What a call takes besides inputs and gradients."""
    most = 64e6 + 16 * point.rows * point.k
    what = f"{who}, {point.rows} rows, K={point.k}: MB besides inputs and gradients"
    result.goal(what, max(row["extra_bytes"], 0) / 1e6, most=most / 1e6)


def judge_teacher(result: Result, point: Any, backend: str, ratio: float) -> None:
    """A teacher in process."""
    what = f"{backend}, K={point.k}: teacher in process / (its LM head + the student's side)"
    result.goal(what, ratio, most=TEACHER_RATIO)
