"""Calls whose columns lie on the ranks of a pool, with whole tensors on every rank.

``Shards`` takes whole logits or heads, passes this rank's columns with their ``VocabShard``, and
makes the gradients whole again. So ``opd_kernels.testing.check`` holds for it as it stands.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import all_reduce

import opd_kernels
from opd_kernels import LinearLogits, TopK, VocabShard, _collectives, testing
from opd_kernels.testing import Case

KINDS = ("padded", "uneven", "one")
TEACHERS = ("alike", "own", "whole")


class Layout(NamedTuple):
    """How the columns lie on the ranks.

    "padded": equal widths, the last ones beyond the vocabulary, as Megatron has them. "uneven":
    cut anywhere, some empty perhaps. "one": one rank has all. ``shuffled``: the ranks in any order.
    """

    ranks: int = 2
    kind: str = "padded"
    shuffled: bool = False
    teacher: str = "alike"
    seed: int = 0


class Columns(NamedTuple):
    """This rank's: from ``start``, ``width`` of them, and how many of these are no padding."""

    start: int
    width: int
    real: int


def columns(vocab: int, layout: Layout, rank: int, seed: int = 0) -> Columns:
    """Which columns a rank holds."""
    source, ranks = random.Random(f"{layout.seed} {seed}"), layout.ranks
    order = list(range(ranks))
    if layout.shuffled:
        source.shuffle(order)
    place = order[rank]
    if layout.kind == "padded":
        width = -(-vocab // ranks)
        start = place * width
        return Columns(start, width, max(min(width, vocab - start), 0))
    if layout.kind == "one":
        cuts = [0] * ranks if source.random() < 0.5 else [0] + [vocab] * (ranks - 1)
        cuts.append(vocab)
    else:
        cuts = [0, *sorted(source.randint(0, vocab) for _ in range(ranks - 1)), vocab]
    start, end = cuts[place : place + 2]
    return Columns(start, end - start, end - start)


class _Part(torch.autograd.Function):
    """Some columns of a whole tensor; the gradient is whole on every rank."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, mine: Columns, group: Any) -> Tensor:
        ctx.rest = dim, mine, group, whole.shape
        shape = list(whole.shape)
        shape[dim] = mine.width
        part = torch.full(shape, torch.nan, dtype=whole.dtype)
        if mine.real:
            part.narrow(dim, 0, mine.real).copy_(whole.narrow(dim, mine.start, mine.real))
        return part

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        dim, mine, group, shape = ctx.rest
        padding = upstream.narrow(dim, mine.real, mine.width - mine.real)
        assert bool((padding == 0).all()), f"gradient of padding: {padding}"
        grad = torch.zeros(shape, dtype=torch.float64)
        if mine.real:
            own = upstream.narrow(dim, 0, mine.real).double()
            grad.narrow(dim, mine.start, mine.real).copy_(own)
        all_reduce(grad, group=group)
        return grad.to(upstream.dtype), None, None, None


class Shards:
    """The public functions, of whole tensors, each call's columns on the ranks of ``group``."""

    def __init__(self, layout: Layout, group: Any) -> None:
        self.layout, self.group = layout, group
        self.outputs: list[Tensor] = []

    def topk_rkl(self, student: Any, teacher: Any, k: int | None = None, **options: Any) -> Any:
        return self._call(opd_kernels.topk_rkl, student, teacher, k, options)

    def topk_divergence(
        self, student: Any, teacher: Any, k: int | None = None, **options: Any
    ) -> Any:
        return self._call(opd_kernels.topk_divergence, student, teacher, k, options)

    def linear_topk_rkl(
        self, hidden: Tensor, head: Tensor, teacher: Any, k: int | None = None, **options: Any
    ) -> Any:
        mine, shard = self._mine(head.shape[0])
        bias = options.pop("student_bias")
        bias = None if bias is None else self._part(bias, 0, mine)
        teacher, more = self._teacher(teacher, head.shape[0], mine)
        found = opd_kernels.linear_topk_rkl(
            hidden, self._part(head, 0, mine), teacher, k, student_bias=bias,
            vocab_shard=shard, **options, **more,
        )  # fmt: skip
        return self._recorded(found)

    def select_topk(self, logits: Any, k: int, **options: Any) -> TopK:
        return self._read(opd_kernels.select_topk, logits, k, options)

    def score_ids(self, logits: Any, ids: Tensor, **options: Any) -> TopK:
        return self._read(opd_kernels.score_ids, logits, ids, options)

    def token_logprobs(self, logits: Any, ids: Tensor, **options: Any) -> Tensor:
        return self._read(opd_kernels.token_logprobs, logits, ids, options)

    def _read(self, function: Any, logits: Any, what: Any, options: dict[str, Any]) -> Any:
        mine, shard = self._mine(_vocab(logits))
        return function(self._side(logits, mine), what, vocab_shard=shard, **options)

    def _call(
        self, function: Any, student: Any, teacher: Any, k: int | None, options: dict[str, Any]
    ) -> Any:
        vocab = _vocab(student)
        mine, shard = self._mine(vocab)
        teacher, more = self._teacher(teacher, vocab, mine)
        part = self._side(student, mine)
        if self.layout.seed % 2 and isinstance(part, Tensor) and not options.get("inplace_grad"):
            part = torch.nn.functional.pad(part, (0, 3))[..., : mine.width]  # rows lie apart
        return self._recorded(function(part, teacher, k, vocab_shard=shard, **options, **more))

    def _mine(self, vocab: int, seed: int = 0) -> tuple[Columns, VocabShard]:
        mine = columns(vocab, self.layout, dist.get_rank(self.group), seed)
        return mine, VocabShard(mine.start, vocab, self.group)

    def _teacher(self, teacher: Any, vocab: int, mine: Columns) -> tuple[Any, dict[str, Any]]:
        if isinstance(teacher, TopK):
            return teacher, {}
        if self.layout.teacher == "whole":
            return teacher, {"teacher_vocab_shard": "whole"}
        theirs = _vocab(teacher)
        if self.layout.teacher == "alike" and theirs == vocab:
            return self._side(teacher, mine), {}
        mine, shard = self._mine(theirs, seed=1)
        return self._side(teacher, mine), {"teacher_vocab_shard": shard}

    def _side(self, source: Any, mine: Columns) -> Any:
        if isinstance(source, Tensor):
            return self._part(source, source.ndim - 1, mine)
        bias = None if source.bias is None else self._part(source.bias, 0, mine)
        weight = self._part(source.weight, 0, mine)
        return LinearLogits(source.hidden, weight, bias, source.softcap, source.scale)

    def _part(self, whole: Tensor, dim: int, mine: Columns) -> Tensor:
        return _Part.apply(whole, dim, mine, self.group)

    def _recorded(self, found: Any) -> Any:
        for output in found if isinstance(found, tuple) else (found,):
            values = (output,) if isinstance(output, Tensor) else output
            self.outputs += [value.detach().clone() for value in values if value is not None]
        return found


def _vocab(source: Any) -> int:
    return source.shape[-1] if isinstance(source, Tensor) else source.vocab


@contextlib.contextmanager
def instead(shards: Shards) -> Iterator[None]:
    """``opd_kernels.testing`` calls these functions.

    A rank rounds its part of the hidden states' gradient, and each sum of parts is rounded once
    more: by that the budget of this gradient grows.
    """
    parts: list[Tensor] = []
    total, close = _collectives.whole_gradient, testing._check_close
    slopes = testing.watched._check_slopes

    def recorded(shard: VocabShard, values: Tensor) -> Tensor:
        size = values.detach().double().abs()
        all_reduce(size, group=shards.group)
        parts.append(size * shards.layout.ranks * torch.finfo(values.dtype).eps / 2)
        return total(shard, values)

    def checked(actual: Tensor, expected: Any, budget: Any, label: str, *rest: Any) -> None:
        if label.startswith("gradient for hidden"):
            budget = budget + sum(part.numpy() for part in parts)
            parts.clear()
        close(actual, expected, budget, label, *rest)

    def checked_slopes(got: Tensor, wanted: Any, budget: Any, label: str) -> None:
        if label.startswith("hidden "):
            budget = budget + sum(part.numpy().reshape(wanted.shape) for part in parts)
            parts.clear()
        slopes(got, wanted, budget, label)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_collectives, "whole_gradient", recorded))
        stack.enter_context(mock.patch.object(testing, "_check_close", checked))
        stack.enter_context(mock.patch.object(testing.watched, "_check_slopes", checked_slopes))
        for name in ("topk_rkl", "topk_divergence", "linear_topk_rkl", "select_topk"):
            stack.enter_context(mock.patch.object(testing, name, getattr(shards, name)))
        stack.enter_context(
            mock.patch.object(testing.watched, "topk_divergence", shards.topk_divergence)
        )
        yield


def bits(tensors: list[Tensor]) -> list[bytes]:
    """What says whether they are the same."""
    return [bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) for tensor in tensors]


def check(
    group: Any, drawn: list[tuple[Case, Layout]], backend: str | None = None
) -> list[list[bytes]]:
    """Each case against float64; the bits of what every call has returned."""
    warnings.simplefilter("ignore")
    found = []
    for case, layout in drawn:
        shards = Shards(layout, group)
        try:
            with instead(shards):
                testing.check(case, backend)
        except Exception as error:
            raise AssertionError(f"{layout}, {case}: {error}") from error
        found.append(bits(shards.outputs))
    return found


def beside_one_rank(
    group: Any, layout: Layout, options: dict[str, Any]
) -> dict[str, tuple[float, float]]:
    """What a head's call returns and its gradients: (off from one rank's, largest), float64."""
    warnings.simplefilter("ignore")
    options = dict(options)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, vocab, size = 5, 33, 7
    hidden, weight, bias = normal(rows, size), normal(vocab, size), normal(vocab)
    teacher, tokens = normal(rows, vocab) * 2, torch.tensor([0, 3, 12, 31, 32])
    teacher, k = teacher[:, : options.pop("teacher_vocab", vocab)], options.pop("k", 9)
    if options.pop("given", False):
        z = 2 * torch.tanh((hidden @ weight.t() + bias) / 2)
        options["student_logsumexp"] = z.logsumexp(-1)
    options |= {"token_ids": tokens, "backend": "reference", "reduction": "none"}
    shards = Shards(layout, group)
    found = []
    for function in (opd_kernels.topk_divergence, shards.topk_divergence):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        outputs = function(LinearLogits(*leaves, softcap=2.0), teacher, k, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        factors = torch.linspace(0.5, 1.5, rows, dtype=torch.float64)
        total = sum((x * factors).sum() for x in outputs if isinstance(x, Tensor))
        grads = torch.autograd.grad(total, leaves)
        flat = {f"output {i}": x for i, x in enumerate(outputs) if isinstance(x, Tensor)}
        if not isinstance(outputs[-1], Tensor):
            flat |= {name: x for name, x in outputs[-1]._asdict().items() if x.is_floating_point()}
        found.append(flat | dict(zip(("hidden", "weight", "bias"), grads, strict=True)))
    return {
        name: (float((x - found[1][name]).abs().max()), float(x.abs().max()))
        for name, x in found[0].items()
    }


def reads_beside_one_rank(
    group: Any, layout: Layout, of_head: bool
) -> dict[str, tuple[float, float]]:
    """What else reads logits or a head: (off from one rank's, largest), in float64."""
    generator = torch.Generator().manual_seed(layout.seed)

    def integers(*shape: int) -> Tensor:  # whose products are exact, with ties between ranks
        return torch.randint(-2, 3, shape, generator=generator).double()

    rows, vocab, k = 5, 33, 12
    leaves = [integers(rows, 7), integers(vocab, 7), integers(vocab)]
    if not of_head:
        leaves = [leaves[0] @ leaves[1].t() + leaves[2]]
    tokens = torch.tensor([0, 3, 12, 32, -100])
    given = torch.randint(-1, vocab + 2, (rows, k), generator=generator)
    mask = torch.tensor([True, True, False, True, True])
    common = {"mask": mask, "vocab_size": 31, "backend": "reference"}
    found: list[dict[str, Tensor]] = []
    shards = Shards(layout, group)
    for module in (opd_kernels, shards):
        used = [leaf.clone().requires_grad_() for leaf in leaves]
        source = LinearLogits(*used, softcap=30.0) if of_head else used[0]
        numbers: dict[str, Tensor] = {}
        for name, support in (
            ("top k", module.select_topk(source, k, token_ids=tokens, top_p=0.9, **common)),
            ("best", module.select_topk(source, vocab, banned_ids=[1, 30], **common)),
            ("scored", module.score_ids(source, given, token_ids=tokens, **common)),
        ):
            for field in ("ids", "logits", "logsumexp", "tail_logsumexp", "token_logits"):
                value = getattr(support, field)
                if value is not None:
                    numbers[f"{name}, {field}"] = value.detach()
        logprobs = module.token_logprobs(source, tokens, temperature=0.7, **common)
        numbers["log-probs"] = logprobs.detach()
        kept = logprobs.isfinite()
        grads = torch.autograd.grad(logprobs[kept].sum(), used)
        found.append(numbers | {f"gradient {i}": grad for i, grad in enumerate(grads)})
    expected, ours = found
    for name, value in expected.items():
        if name.endswith(("ids", "logits")):
            assert bits([ours[name]]) == bits([value]), (name, ours[name], value)
        assert torch.equal(ours[name].isfinite(), value.isfinite()), (name, ours[name], value)
    return {
        name: tuple(
            float(torch.nan_to_num(x.double(), 0, 0, 0).abs().max())
            for x in (ours[name] - value, value)
        )
        for name, value in expected.items()
    }


def gradient_parts(group: Any) -> tuple[Tensor, Tensor]:
    """The hidden states' gradient: this rank's part alone, and the sum over the ranks."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(*shape, generator=generator) for shape in ((4, 6), (20, 6), (4, 20))
    )
    start = 10 * dist.get_rank(group)
    mine = slice(start, start + 10)
    found = []
    for reduced in (False, True):
        leaf = hidden.clone().requires_grad_()
        shard = VocabShard(start, 20, group, reduce_hidden_grad=reduced)
        head = LinearLogits(leaf, weight[mine])
        opd_kernels.topk_divergence(
            head, teacher[:, mine], 4, outside="bucket", vocab_shard=shard
        ).backward()
        found.append(leaf.grad)
    return found[0], found[1]


class Sent(NamedTuple):
    """A collective: in "forward" or "backward", its name, and the bytes that all ranks get."""

    phase: str
    name: str
    size: int


def traffic(
    group: Any, of_head: bool, vocab: int, k: int, options: dict[str, Any], teacher: str
) -> list[Sent]:
    """The collectives of a call that the ranks have agreed on, and of its backward."""
    warnings.simplefilter("ignore")
    rows, size, ranks = 6, 5, dist.get_world_size(group)
    width = vocab // ranks
    start = width * dist.get_rank(group)
    mine = slice(start, start + width)
    shard = VocabShard(start, vocab, group)
    generator = torch.Generator().manual_seed(0)
    logits, weight = torch.randn(rows, vocab, generator=generator), torch.randn(vocab, size)
    hidden = torch.randn(rows, size, generator=generator)
    options = {"token_ids": torch.zeros(rows, dtype=torch.long), **options}
    given: Any = logits[:, mine]
    if teacher == "topk":
        given = opd_kernels.select_topk(
            logits, k, with_logsumexp=True, token_ids=options["token_ids"]
        )
    if teacher == "head":
        given = LinearLogits(hidden, weight[mine])
    sent: list[Sent] = []
    phase = "forward"

    def gather(output: Tensor, values: Tensor, group: Any = None) -> None:
        sent.append(Sent(phase, "gather", output.numel() * output.element_size()))
        all_gather(output, values, group=group)

    def reduce(values: Tensor, group: Any = None) -> None:
        sent.append(Sent(phase, "reduce", values.numel() * values.element_size() * ranks))
        all_reduce(values, group=group)

    all_gather = _collectives._all_gather
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_collectives, "_all_gather", gather))
        stack.enter_context(mock.patch.object(dist, "all_reduce", reduce))
        for turn in range(2):
            sent.clear()
            phase = "forward"
            leaves = [x.clone().requires_grad_() for x in (hidden, weight[mine], logits[:, mine])]
            student = LinearLogits(*leaves[:2]) if of_head else leaves[2]
            if turn:  # nothing else is left
                for name in OTHERS:
                    stack.enter_context(mock.patch.object(dist, name, _refused))
            found = opd_kernels.topk_divergence(
                student,
                given,
                None if teacher == "topk" else k,
                vocab_shard=shard,
                **options,
            )
            outputs = found if isinstance(found, tuple) else (found,)
            phase = "backward"
            sum(x.sum() for x in outputs if isinstance(x, Tensor)).backward()
    return sent


def collectives(group: Any) -> dict[str, tuple[int, int]]:
    """How many collectives the forward of a call takes, and the bytes that all ranks get.

    By what is asked for, of 3 rows and 5 entries.
    """
    warnings.simplefilter("ignore")
    rows, size, vocab, k = 3, 4, 24, 5
    width = vocab // dist.get_world_size(group)
    start = width * dist.get_rank(group)
    mine, shard = slice(start, start + width), VocabShard(start, vocab, group)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (rows,), generator=generator)
    hidden = torch.randn(rows, size, generator=generator)
    weight = torch.randn(vocab, size, generator=generator)
    logits = hidden @ weight.T
    topk = opd_kernels.select_topk(logits, k, with_logsumexp=True, token_ids=tokens)
    sides = {"logits": logits[:, mine], "head": LinearLogits(hidden, weight[mine])}
    counts = {}
    for (student, ours), (teacher, theirs), support, outside, token, logprobs, stats in product(
        sides.items(),
        {**sides, "topk": topk}.items(),
        ("teacher", "student"),
        ("renormalize", "bucket", "sample"),
        (False, True),
        (False, True),
        ((), ("student_mass",), ("overlap", "teacher_entropy")),
    ):
        if (support == "student" and teacher == "topk") or (token and outside == "sample"):
            continue  # refused
        options: Any = {"support": support, "outside": outside, "include_token": token}
        options |= {"return_token_logprobs": logprobs, "vocab_shard": shard, "token_ids": tokens}
        options["return_stats"] = stats or False

        def call(ours: Any = ours, theirs: Any = theirs, options: Any = options) -> None:
            opd_kernels.topk_divergence(
                ours, theirs, None if isinstance(theirs, TopK) else k, **options
            )

        call()  # on which the ranks agree
        exchanged = mock.patch.object(_collectives, "exchanged", wraps=_collectives.exchanged)
        with (
            mock.patch.object(_collectives, "_run", wraps=_collectives._run) as run,
            exchanged as each,
        ):
            call()
        sent = [x for one in each.call_args_list for x in (*one.args[1], one.args[2])]
        size = sum(x.numel() * x.element_size() for x in sent) * shard.ranks
        said = (student, teacher, support, outside, token, logprobs, *stats)
        counts[" ".join(map(str, said))] = run.call_count, size
    return counts


OTHERS = [
    name
    for name in dir(dist)
    if name.startswith(("all_gather", "reduce_scatter", "broadcast", "gather", "scatter", "send"))
] + ["all_to_all", "all_to_all_single", "barrier", "reduce", "recv"]


def _refused(*args: Any, **options: Any) -> None:
    raise AssertionError("a collective that is not counted")


def same_bits(group: Any, drawn: list[tuple[Case, Layout]]) -> None:
    """Loss and gradient are those of one rank."""
    warnings.simplefilter("ignore")
    for case, layout in drawn:
        _, *expected = testing.results(case, testing.make_inputs(case), None)
        with instead(Shards(layout, group)):
            _, *found = testing.results(case, testing.make_inputs(case), None)
        ours, theirs = (bits([loss, *grads]) for loss, grads in (found, expected))
        assert ours == theirs, (layout, case, found, expected)


def wrong(group: Any, what: str, later: bool) -> None:
    """A call that does not fit that of the other rank; ``later``: while debugging, after others."""
    with opd_kernels.debug(later):
        _wrong(group, what, later)


def _wrong(group: Any, what: str, later: bool) -> None:
    rank = dist.get_rank(group)
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(4, 20, generator=generator) for _ in range(2))

    def call(
        k: int = 5,
        start: int = 10 * rank,
        end: int = 10 * rank + 10,
        vocab: int = 20,
        teacher: Any = None,
        rows: int = 4,
        **options: Any,
    ) -> None:
        student = z[:rows, start:end].clone().requires_grad_()
        teacher = t[:rows, start:end] if teacher is None else teacher
        shard = options.pop("vocab_shard", VocabShard(start, vocab, group))
        k = None if isinstance(teacher, TopK) else k
        opd_kernels.topk_divergence(student, teacher, k, vocab_shard=shard, **options).backward()

    if later:
        call()
    if what == "k":
        call(k=5 + rank)
    elif what == "outside":
        call(outside=("bucket", "renormalize")[rank])
    elif what == "support":
        call(support=("teacher", "student")[rank])
    elif what == "token":
        call(include_token=bool(rank), token_ids=torch.zeros(4, dtype=torch.long))
    elif what == "stats":
        options = {"return_stats": ("overlap",)} if rank else {}
        student, shard = z[:, 10 * rank : 10 * rank + 10], VocabShard(10 * rank, 20, group)
        opd_kernels.topk_rkl(
            student, t[:, 10 * rank : 10 * rank + 10], 5, vocab_shard=shard, **options
        )
    elif what == "rows":
        call(rows=4 - rank)
    elif what == "dtype":
        call(teacher=t[:, 10 * rank : 10 * rank + 10].to((torch.float64, torch.float32)[rank]))
    elif what == "reduced":
        mine, shard = slice(10 * rank, 10 * rank + 10), VocabShard(10 * rank, 20, group, bool(rank))
        head = LinearLogits(z[:, :6].clone().requires_grad_(), t.T[mine, :3].repeat(1, 2))
        opd_kernels.topk_rkl(head, t[:, mine], 5, vocab_shard=shard).backward()
    elif what == "overlap":
        call(start=8 * rank)
    elif what == "gap":
        call(end=9 + 11 * rank)
    elif what == "vocabulary":
        call(vocab=20 + rank)
    elif what == "short":
        call(vocab=22)
    elif what == "beyond":
        call(vocab_shard=VocabShard(30 * rank, 20, group))
    elif what == "teacher's width":
        call(teacher=t[:, : 7 + rank])
    elif what == "topk":
        support = opd_kernels.select_topk(t, 5)
        call(teacher=support, teacher_vocab_shard=VocabShard(10 * rank, 20, group))
    elif what == "whole":
        call(vocab_shard=None, teacher_vocab_shard="whole")
    elif what == "type":
        call(vocab_shard=10 * rank)
    elif what == "head's option":
        call(outside="bucket", student_logsumexp=z.logsumexp(-1))
    elif what == "head's background":
        tokens = torch.zeros(4, dtype=torch.long)
        call(outside="bucket", background="sampled", token_ids=tokens)
    elif what == "backend":  # rank 1 has no columns to read
        call(start=20 * rank, end=20, backend="cuda")
    elif what in ("head's backend", "gather's backend"):
        shard = VocabShard(20 * rank, 20, group)
        head = LinearLogits(z[:, :6].clone().requires_grad_(), t.T[20 * rank :, :3].repeat(1, 2))
        support = opd_kernels.select_topk(t, 5, with_logsumexp=True)
        outside = "bucket" if what == "head's backend" else "renormalize"
        opd_kernels.topk_divergence(
            head, support, outside=outside, vocab_shard=shard, backend="cuda"
        ).backward()
    elif what == "raises":
        if rank:
            raise ValueError("the data ran out")
        call()
    else:
        raise AssertionError(what)


def die(group: Any) -> None:
    """The last rank ends at once, the others wait for it."""
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        os._exit(3)
    dist.barrier(group=group)


def hang(group: Any) -> None:
    """The last rank does not answer."""
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        time.sleep(3600)


def fail(group: Any) -> int:
    """The last rank raises."""
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        raise ValueError("the last one")
    return dist.get_rank(group)
