"""``TopK`` as a container: moving, indexing, concatenating, saving, mapping, compiling."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, default_collate

from opd_kernels import LinearLogits, TopK, select_topk, topk_rkl

PER_ROW = ("logsumexp", "tail_logsumexp", "token_logits")
# Without fields per row, with one, with all.
SOME = [(), PER_ROW[:1], PER_ROW[2:], PER_ROW]


def make(*rows: int, k: int = 4, per_row: tuple[str, ...] = PER_ROW, seed: int = 0) -> TopK:
    generator = torch.Generator().manual_seed(seed)
    return TopK(
        torch.randint(0, 50, (*rows, k), generator=generator, dtype=torch.int32),
        torch.randn(*rows, k, generator=generator),
        **{name: torch.randn(rows, generator=generator) for name in per_row},
        temperature=0.75,
    )


def tensors(topk: TopK) -> tuple[torch.Tensor | None, ...]:
    return topk.ids, topk.logits, *(getattr(topk, name) for name in PER_ROW)


def assert_same(a: TopK, b: TopK) -> None:
    assert isinstance(a, TopK)
    assert a.temperature == b.temperature
    for x, y in zip(tensors(a), tensors(b), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3)), TypeError, "ids have dtype torch.float32"),
        ((torch.zeros(2, 3).short(), torch.zeros(2, 3)), TypeError, "allowed are int32 and int64"),
        ((torch.zeros(2, 3).int(), torch.zeros(2, 3).int()), TypeError, "logits have dtype"),
        ((torch.zeros(2, 3).int(), torch.zeros(2, 4)), ValueError, r"\(2, 3\) and logits \(2, 4\)"),
        ((torch.tensor(3), torch.tensor(0.5)), ValueError, r"must be \(..., K\)"),
        ((torch.zeros(2, 0).int(), torch.zeros(2, 0)), ValueError, "width 0"),
        ((torch.zeros(2, 3).int(), torch.zeros(2, 3, device="meta")), ValueError, "move one"),
        ((torch.zeros(2, 3).int(), torch.zeros(2, 3), torch.zeros(2, 1)), ValueError,
         r"logsumexp has shape \(2, 1\), expected one per row: \(2,\)"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TopK(*arguments)


@pytest.mark.parametrize("name", PER_ROW)
def test_fields_per_row_that_are_refused(name: str) -> None:
    ids, logits = torch.zeros(2, 3).int(), torch.zeros(2, 3)
    for given, error, message in (
        (
            torch.zeros(2, 3),
            ValueError,
            rf"{name} has shape \(2, 3\), expected one per row: \(2,\)",
        ),
        (torch.zeros(2).int(), TypeError, f"{name} have dtype torch.int32"),
        (torch.zeros(2, device="meta"), ValueError, f"ids are on cpu and {name} on meta"),
        ([0.0, 0.0], TypeError, f"{name} is a list, expected a tensor"),
        (torch.zeros(2).to_sparse(), TypeError, f"{name} is torch.sparse_coo"),
    ):
        with pytest.raises(error, match=message):
            TopK(ids, logits, **{name: given})


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (torch.tensor(0.7), TypeError, "TopK temperature is a Tensor, expected a number"),
        (True, TypeError, "TopK temperature is a bool"),
        (None, TypeError, "TopK temperature is a NoneType"),
        ("1", TypeError, "TopK temperature is a str"),
        (0.0, ValueError, "TopK temperature is 0.0, allowed are numbers above 0"),
        (-1.0, ValueError, "TopK temperature is -1.0"),
        (float("nan"), ValueError, "TopK temperature is nan"),
        (float("inf"), ValueError, "TopK temperature is inf"),
    ],
)
def test_temperatures_that_are_refused(
    temperature: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TopK(torch.zeros(2, 3).int(), torch.zeros(2, 3), temperature=temperature)


def test_a_temperature_becomes_a_python_float() -> None:
    for given in (2, np.float32(2), np.int64(2)):
        topk = TopK(torch.zeros(2, 3).int(), torch.zeros(2, 3), temperature=given)
        assert type(topk.temperature) is float
        assert topk.temperature == 2.0
        assert_same(through_torch_save(topk), topk)


def test_validate_names_the_first_bad_id_and_returns_itself() -> None:
    topk = make(2, 3)
    topk.ids[1, 2, 0] = -1
    assert topk.validate(50) is topk
    topk.ids[1, 0, 2], topk.ids[1, 1, 3] = 50, -2
    with pytest.raises(ValueError, match=r"2 ids outside \[0, 50\).* 50 at \(1, 0, 2\)"):
        topk.validate(50)
    assert topk.ids.dtype == torch.int32
    topk.ids[1, 1, 3] = -1
    topk.validate(51)


def test_validate_takes_an_int() -> None:
    for vocab in (float("nan"), 50.0, True, None, "50"):
        with pytest.raises(TypeError, match=f"vocab_size is a {type(vocab).__name__}"):
            make(2).validate(vocab)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        make(2).validate(0)


def test_validate_sees_ids_that_int32_does_not_hold() -> None:
    with pytest.raises(ValueError, match="1 ids outside"):
        TopK(torch.tensor([[3, 2**32 + 3]]), torch.zeros(1, 2)).validate(50)


@pytest.mark.parametrize("vocab", [2**31, 2**33])
def test_vocabularies_whose_ids_int32_does_not_hold_are_refused(vocab: int) -> None:
    huge, topk = torch.empty(2, vocab, device="meta"), make(2, per_row=()).to("meta")
    for call in (
        lambda: select_topk(huge, 4),
        lambda: topk_rkl(huge, topk),
        lambda: topk_rkl(huge[:, :50], huge, 4),
        lambda: topk_rkl(huge, huge, 4),
        lambda: LinearLogits(torch.empty(2, 1, device="meta"), huge[:1].t()),
    ):
        with pytest.raises(ValueError, match=f"vocabulary of {vocab}, allowed is at most 21474836"):
            call()
    # On the CPU, where one element stands for all.
    with pytest.raises(ValueError, match="ids are int32"):
        select_topk(torch.zeros(1, 1).expand(1, vocab), 4)


def test_the_largest_vocabulary_is_not_refused() -> None:
    select_topk(torch.empty(2, 2**31 - 1, device="meta"), 4)


# Rows


@pytest.mark.parametrize("per_row", [(), PER_ROW])
@pytest.mark.parametrize(
    "index",
    [
        0, -1, slice(1, None), slice(None, None, 2), None, ..., (), True, (1, 2), (..., 0),
        (0, ...), (slice(None), -1), (..., slice(1, 3)), (None, 0), (0, None), (..., None),
        (True, 0, 1, 0), (None, ..., None, 1), [0, 0, 1], ([0, 1], [2, 0]),
        np.array([1, 0]), np.int64(1),
        torch.tensor(1), torch.tensor([1, 0, 1]), torch.tensor([[0, 1], [1, 1]]),
        (slice(None), torch.tensor([2, 0])), (torch.tensor([0, 1]), torch.tensor([1, 2])),
        (torch.tensor([0, 1]), slice(None), torch.tensor([1, 1])),
        (..., torch.tensor([1, 0])), (torch.tensor([1, 0]), ...),
        torch.tensor([True, False]), torch.tensor([False, False]),
        (slice(None), torch.tensor([True, False, True])),
        (..., torch.tensor([True, False])),
        torch.tensor([[True, False, True], [False, False, True]]),
        np.array([[True, False, True], [False, False, True]]),
        torch.tensor([[[True, False]] * 3] * 2),
        (torch.tensor([[True, False, True], [False, False, True]]), 1),
    ],
    ids=repr,
)  # fmt: skip
def test_rows_are_indexed_as_in_a_tensor(index: Any, per_row: tuple[str, ...]) -> None:
    topk = make(2, 3, 2, per_row=per_row)
    numbers = torch.arange(12).view(2, 3, 2)[index]
    picked = topk[index]
    assert picked.shape == numbers.shape
    assert torch.equal(picked.ids, topk.ids.view(12, 4)[numbers])
    assert torch.equal(picked.logits, topk.logits.view(12, 4)[numbers])
    for name in PER_ROW:
        if name in per_row:
            assert torch.equal(getattr(picked, name), getattr(topk, name).view(12)[numbers])
        else:
            assert getattr(picked, name) is None


@pytest.mark.parametrize("per_row", [(), PER_ROW])
@pytest.mark.parametrize(
    "index",
    [
        [[True, False, True], [False, False, True]], [[True] * 3] * 2, [[False] * 3] * 2,
        [[[True, False]] * 3] * 2, ([[True, False, True], [False, False, True]], 1),
        (0, [True, False, True]), [True, False], [[0, 1], [1, 1]], ([[0, 1], [1, 1]], [2]),
        (slice(None), [[0, 2]]), (..., [[True, False]] * 3), [], [[]], (0, []),
        [torch.tensor(1), torch.tensor(0)], [np.int64(1), 0],
    ],
    ids=repr,
)  # fmt: skip
def test_lists_index_as_the_tensors_that_they_mean(index: Any, per_row: tuple[str, ...]) -> None:
    def meant(part: Any) -> Any:
        if not isinstance(part, list):
            return part
        return torch.tensor(part) if np.size(part) else torch.zeros(np.shape(part)).long()

    topk = make(2, 3, 2, per_row=per_row)
    as_tensors = tuple(map(meant, index)) if isinstance(index, tuple) else meant(index)
    numbers = torch.arange(12).view(2, 3, 2)[as_tensors]
    assert_same(topk[index], topk[as_tensors])
    assert torch.equal(topk[index].ids, topk.ids.view(12, 4)[numbers])


@pytest.mark.parametrize(
    ("index", "used"),
    [
        ((0, 0, 0), 3), ((0, slice(None), slice(None)), 3), ((..., 0, 0, 0), 3),
        (torch.ones(2, 3, 4, dtype=torch.bool), 3), (np.ones((2, 3, 4), dtype=bool), 3),
        ((torch.ones(2, 3, dtype=torch.bool), 0), 3), ([[[True] * 4] * 3] * 2, 3),
        (([[True] * 3] * 2, 0), 3),
    ],
)  # fmt: skip
def test_indexing_into_the_entries_is_refused(index: Any, used: int) -> None:
    with pytest.raises(IndexError, match=f"2 leading dimensions, but {used} were indexed"):
        make(2, 3)[index]


def test_a_mask_in_lists_does_not_reach_the_entries() -> None:
    """Of one leading dimension: the list has two."""
    with pytest.raises(IndexError, match="1 leading dimensions, but 2 were indexed"):
        make(4, k=3)[[[True, False, True]] * 4]


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        make(2, 3)[2]


def test_slices_share_memory() -> None:
    topk = make(4)
    topk[1:3].ids.fill_(7)
    assert (topk.ids[1:3] == 7).all()


def test_length_and_iteration_run_over_the_first_dimension() -> None:
    topk = make(3, 2)
    assert len(topk) == 3
    rows = list(topk)
    assert [row.shape for row in rows] == [(2,)] * 3
    assert_same(rows[1], topk[1])
    assert len(make(0)) == 0
    assert list(make(0)) == []


def test_a_single_row_has_no_length_and_no_rows() -> None:
    row = make()
    assert row.shape == ()
    assert row.k == 4
    with pytest.raises(TypeError, match="single row has no length"):
        len(row)
    with pytest.raises(TypeError, match="single row has no length"):
        list(row)
    with pytest.raises(IndexError, match="0 leading dimensions, but 1 were indexed"):
        row[0]


@pytest.mark.parametrize(
    ("rows", "shape"),
    [((2, 3), (6,)), ((2, 3), (-1,)), ((2, 3), (3, -1)), ((1,), ()), ((), (1, 1))],
)
def test_reshape_changes_leading_dimensions_only(
    rows: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    topk = make(*rows)
    reshaped = topk.reshape(*shape)
    assert reshaped.k == 4
    for name in PER_ROW:
        assert torch.equal(getattr(reshaped, name), getattr(topk, name).reshape(shape))
    assert_same(reshaped.reshape(*rows), topk)


def test_reshape_takes_one_tuple() -> None:
    topk = make(6)
    for shape in ((2, 3), [2, 3], torch.Size([3, 2]), (-1, 2)):
        assert_same(topk.reshape(shape), topk.reshape(*shape))
    assert make(1).reshape(()).shape == ()


# Concatenation


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_cat_joins_rows_along_a_leading_dimension(dim: int) -> None:
    parts = [make(2, 3, seed=0), make(2, 3, seed=1)]
    whole = TopK.cat(parts, dim=dim)
    rows = torch.cat([part.logsumexp for part in parts], dim)
    assert whole.shape == rows.shape
    assert torch.equal(whole.logsumexp, rows)
    along = [slice(None)] * 2
    along[dim] = slice(-parts[1].shape[dim], None)
    assert_same(whole[tuple(along)], parts[1])


@pytest.mark.parametrize("name", PER_ROW)
def test_what_all_parts_have_is_kept(name: str) -> None:
    others = tuple(other for other in PER_ROW if other != name)
    for join in (TopK.cat, TopK.stack):
        joined = join([make(2), make(2, per_row=others)])
        assert getattr(joined, name) is None
        assert all(getattr(joined, other) is not None for other in others)
        assert joined.temperature == 0.75
        alone = join([make(2, per_row=(name,)), make(2, seed=1)])
        assert getattr(alone, name).numel() == 4
        assert all(getattr(alone, other) is None for other in others)


def test_parts_of_several_temperatures_are_not_joined() -> None:
    parts = [make(2), dataclasses.replace(make(2), temperature=1.0)]
    for join in (TopK.cat, TopK.stack, default_collate):
        with pytest.raises(ValueError, match=r"parts of temperatures \[0.75, 1.0\], expected one"):
            join(parts)


def test_cat_of_an_iterator_and_of_its_rows_gives_the_whole() -> None:
    topk = make(5)
    assert_same(TopK.cat(row[None] for row in topk), topk)


@pytest.mark.parametrize(
    ("parts", "dim", "message"),
    [
        ([], 0, "got no parts"),
        ([make(2, k=3), make(2, k=5), make(1, k=3)], 0, r"widths \[3, 5\], expected one"),
        ([make(2, 3)], 2, r"dim 2, but the leading shape is \(2, 3\)"),
        ([make(2, 3)], -3, "dim -3"),
        ([make()], 0, r"dim 0, but the leading shape is \(\)"),
        ([make(2, 3), make(2, 4)], 0, r"shapes \(2, 3\) and \(2, 4\), which do not fit.*\.pad"),
        ([make(2, 3), make(2)], 1, r"shapes \(2, 3\) and \(2,\)"),
    ],
)
def test_cat_says_what_does_not_fit(parts: list[TopK], dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopK.cat(parts, dim)


@pytest.mark.parametrize("join", [TopK.cat, TopK.stack])
def test_what_is_no_support_is_not_joined(join: Callable[..., TopK]) -> None:
    with pytest.raises(TypeError, match="got a NoneType, expected a sequence of TopK"):
        join(None)
    with pytest.raises(TypeError, match="got a Tensor among its parts, not a TopK"):
        join([make(2), torch.zeros(2, 4)])
    with pytest.raises(TypeError, match="dim is a float, expected an int"):
        join([make(2)], 0.5)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_stack_joins_along_a_new_leading_dimension(dim: int) -> None:
    parts = [make(2, 3, seed=seed) for seed in range(4)]
    whole = TopK.stack(iter(parts), dim)
    assert torch.equal(whole.logsumexp, torch.stack([part.logsumexp for part in parts], dim))
    for i, part in enumerate(parts):
        index = [slice(None)] * 3
        index[dim] = i
        assert_same(whole[tuple(index)], part)


@pytest.mark.parametrize(
    ("parts", "dim", "message"),
    [
        ([], 0, "TopK.stack got no parts"),
        ([make(2, k=3), make(2, k=5)], 0, r"widths \[3, 5\], expected one.*pad\(k=5\)"),
        ([make(2, 3)], 3, r"dim 3, but the leading shape is \(2, 3\)"),
        ([make(2, 3)], -4, "dim -4"),
        ([make(2), make(3)], 0, r"shapes \(2,\) and \(3,\), which do not fit.*\.pad"),
    ],
)
def test_stack_says_what_does_not_fit(parts: list[TopK], dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopK.stack(parts, dim)


@pytest.mark.parametrize("per_row", SOME)
def test_pad_adds_absent_entries_and_rows(per_row: tuple[str, ...]) -> None:
    topk = make(2, 3, per_row=per_row)
    padded = topk.pad(4, 5, k=6)
    assert padded.ids.shape == padded.logits.shape == (4, 5, 6)
    cut = padded[:2, :3]
    assert_same(dataclasses.replace(cut, ids=cut.ids[..., :4], logits=cut.logits[..., :4]), topk)
    assert (padded.ids >= 0).sum() == (padded.logits > -torch.inf).sum() == 24
    assert padded.present.sum() == 6
    assert all(getattr(padded, name).isnan().sum() == 14 for name in per_row)
    assert_same(topk.pad(), topk)
    wider = topk.pad(k=6)
    assert wider.shape == (2, 3)
    assert_same(dataclasses.replace(wider, ids=topk.ids, logits=topk.logits), topk)
    assert make().pad(k=5).ids.shape == (5,)


def test_padding_leaves_the_loss() -> None:
    student, topk = torch.randn(5, 50), make(3)
    loss = topk_rkl(student, topk.pad(5, k=7), reduction="none")
    assert torch.equal(loss[:3], topk_rkl(student[:3], topk, reduction="none"))
    assert (loss[3:] == 0).all()


def test_pad_says_what_does_not_fit() -> None:
    for rows, k in (((1, 3), None), ((2, 3), 3), ((2,), None), ((2, 3, 4), None)):
        with pytest.raises(ValueError, match="expected as many dimensions, none smaller"):
            make(2, 3).pad(*rows, k=k)
    with pytest.raises(TypeError, match="pad's size is a float"):
        make(2).pad(2.0)
    with pytest.raises(ValueError, match="k is 0"):
        make(2).pad(k=0)


def test_default_collate_stacks() -> None:
    parts = [make(3, seed=seed) for seed in range(2)]
    batch = default_collate([{"teacher": part, "tokens": torch.zeros(3)} for part in parts])
    assert_same(batch["teacher"], TopK.stack(parts))


# Moving


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("meta", torch.bfloat16), {}),
        ((torch.device("meta"),), {"dtype": torch.bfloat16, "non_blocking": True}),
        ((), {"device": "meta", "dtype": torch.bfloat16, "copy": True}),
        ((torch.zeros(1, dtype=torch.bfloat16, device="meta"),), {}),
    ],
)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_to_moves_all_and_converts_all_but_ids(
    args: tuple[Any, ...], kwargs: dict[str, Any], id_dtype: torch.dtype
) -> None:
    topk = make(2, 3)
    topk = dataclasses.replace(topk, ids=topk.ids.to(id_dtype))
    moved = topk.to(*args, **kwargs)
    assert moved.device.type == "meta"
    assert [x.device.type for x in tensors(moved)] == ["meta"] * 5
    assert [x.dtype for x in tensors(moved)] == [id_dtype] + [torch.bfloat16] * 4
    assert moved.temperature == 0.75


def test_to_a_device_or_a_dtype_alone_leaves_the_other() -> None:
    topk = make(2, per_row=())
    assert topk.to("meta").logits.dtype == torch.float32
    assert topk.to(torch.float64).device.type == "cpu"
    assert topk.to(torch.float64).logits.dtype == torch.float64
    assert topk.to("meta").logsumexp is None


def test_to_a_device_without_float64_makes_log_sum_exps_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topk = dataclasses.replace(make(2), logsumexp=torch.zeros(2).double())
    assert topk.to("meta").logsumexp.dtype == torch.float64
    monkeypatch.setattr("opd_kernels.support.wide_dtype", lambda device: torch.float32)
    assert topk.to("meta").logsumexp.dtype == torch.float32


def test_to_copies_only_if_it_must_or_is_told_to() -> None:
    topk = make(2)
    for same, fresh in zip(
        tensors(topk.to("cpu")), tensors(topk.to("cpu", copy=True)), strict=True
    ):
        assert any(same is x for x in tensors(topk))
        assert not any(fresh.data_ptr() == x.data_ptr() for x in tensors(topk))


@pytest.mark.parametrize(
    "args",
    [("cpu", torch.float32, False, True), (torch.float32, False, True)],
)
def test_to_copies_where_it_is_told_by_place(args: tuple[Any, ...]) -> None:
    topk = make(2)
    for fresh, old in zip(tensors(topk.to(*args)), tensors(topk), strict=True):
        assert fresh.data_ptr() != old.data_ptr()
        assert torch.equal(fresh, old)


def test_to_an_integer_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="logits have dtype"):
        make(2).to(torch.int64)


def test_detach_cuts_the_graph() -> None:
    topk = TopK(torch.zeros(2, 3).int(), torch.zeros(2, 3, requires_grad=True))
    assert not topk.detach().logits.requires_grad
    assert topk[0].logits.requires_grad


# Copies, files, processes


def through_torch_save(topk: TopK) -> Any:
    file = io.BytesIO()
    torch.save({"teacher": topk}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["teacher"]


@pytest.mark.parametrize("per_row", SOME)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), through_torch_save],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_copies_are_equal(copied: Callable[[TopK], TopK], per_row: tuple[str, ...]) -> None:
    topk = make(2, 3, per_row=per_row)
    assert_same(copied(topk), topk)


def test_a_deep_copy_has_memory_of_its_own() -> None:
    topk = make(2)
    copy.deepcopy(topk).ids.fill_(-1)
    assert (topk.ids >= 0).all()


@pytest.mark.parametrize("with_logsumexp", [True, False])
def test_files_of_three_fields_load(with_logsumexp: bool) -> None:
    """What versions without the fields after logsumexp have written."""
    new = make(2, 3, per_row=PER_ROW[: int(with_logsumexp)])
    old = object.__new__(TopK)
    for name in ("ids", "logits", "logsumexp"):
        object.__setattr__(old, name, getattr(new, name))
    assert set(vars(old)) == {"ids", "logits", "logsumexp"}
    expected = dataclasses.replace(new, temperature=1.0)
    for loaded in (through_torch_save(old), pickle.loads(pickle.dumps(old))):
        assert "temperature" not in vars(loaded)
        assert_same(loaded, expected)
        assert_same(TopK.cat([loaded[:1], expected[1:]]), expected)
        assert repr(loaded) == repr(expected)
        assert pytree.tree_structure(loaded) == pytree.tree_structure(expected)


class Supports(Dataset):
    """One support per item, as cached by a teacher."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> TopK:
        if i >= 4:
            raise IndexError(i)
        return make(1, 3, seed=i)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_of_a_data_loader_send_supports() -> None:
    loader = DataLoader(
        Supports(), batch_size=2, num_workers=2, collate_fn=TopK.cat, multiprocessing_context="fork"
    )
    assert_same(TopK.cat(loader), TopK.cat(Supports()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pinned_memory_holds_the_same() -> None:
    topk = make(2, 3)
    pinned = topk.pin_memory()
    assert all(x.is_pinned() for x in tensors(pinned))
    assert_same(pinned, topk)


# Pytree


@pytest.mark.parametrize("per_row", SOME)
def test_tree_map_sees_the_tensors_that_are_there(per_row: tuple[str, ...]) -> None:
    topk = make(2, 3, per_row=per_row)
    leaves, spec = pytree.tree_flatten({"teacher": topk})
    assert [x.data_ptr() for x in leaves] == [x.data_ptr() for x in tensors(topk) if x is not None]
    assert_same(pytree.tree_unflatten(leaves, spec)["teacher"], topk)
    assert_same(pytree.tree_map(lambda x: x[1:], topk), topk[1:])
    restored = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert restored == spec
    assert_same(pytree.tree_unflatten(leaves, restored)["teacher"], topk)


def test_paths_name_the_fields() -> None:
    def paths(tree: Any) -> list[str]:
        return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]

    names = ["ids", "logits", *PER_ROW]
    assert paths([make(2)]) == [f"[0].{name}" for name in names]
    assert paths(make(2, per_row=())) == [".ids", ".logits"]
    assert paths(make(2, per_row=PER_ROW[1:])) == [f".{name}" for name in (*names[:2], *names[3:])]
    hidden, weight, bias = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5)
    assert paths(LinearLogits(hidden, weight, bias)) == [".hidden", ".weight", ".bias"]
    topk, seen = make(2), []
    mapped = pytree.tree_map_with_path(lambda path, x: seen.append(path) or x[:1], topk)
    assert len(seen) == 5
    assert_same(mapped, topk[:1])
    head = LinearLogits(hidden, weight, softcap=3.0)
    halved = pytree.tree_map_with_path(lambda path, x: x / 2, head)
    assert torch.equal(halved.weight, weight / 2)
    assert halved.softcap == 3.0
    leaves, spec = pytree.tree_flatten(head)
    restored = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert restored == spec
    assert pytree.tree_unflatten(leaves, restored).softcap == 3.0


class Loss(torch.nn.Module):
    """What a user would export."""

    def forward(self, student: torch.Tensor, teacher: TopK | LinearLogits) -> torch.Tensor:
        support = teacher if isinstance(teacher, TopK) else select_topk(teacher, 4)
        return topk_rkl(student, support)


@pytest.mark.parametrize("kind", ["all", "no fields per row", "token_logits", "head"])
def test_exported_programs_take_supports_and_heads(kind: str) -> None:
    def draw() -> TopK | LinearLogits:
        if kind == "head":
            return LinearLogits(torch.randn(2, 3, 8), torch.randn(50, 8), softcap=2.0)
        return make(2, 3, per_row=PER_ROW if kind == "all" else PER_ROW[2:] * (kind in PER_ROW))

    student, teacher = torch.randn(2, 3, 50), draw()
    program = torch.export.export(Loss(), (student, teacher))
    student, teacher = torch.randn(2, 3, 50), draw()
    expected = Loss()(student, teacher)
    torch.testing.assert_close(program.module()(student, teacher), expected)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(student, teacher), expected)


def test_tree_map_may_put_anything_at_the_leaves() -> None:
    shapes = pytree.tree_map(lambda x: tuple(x.shape), make(2, 3))
    assert tensors(shapes) == ((2, 3, 4), (2, 3, 4), (2, 3), (2, 3), (2, 3))
    assert pytree.tree_leaves(pytree.tree_map(str, shapes)) == [*"234234", *"23" * 3]
    assert "ids=(2, 3, 4)" in repr(shapes)


def test_vmap_maps_over_rows() -> None:
    student, topk = torch.randn(3, 2, 50), make(3, 2)
    mapped = torch.vmap(lambda s, t: topk_rkl(s, t, reduction="none"))(student, topk)
    assert torch.equal(mapped, topk_rkl(student, topk, reduction="none"))


# Looks


def test_repr_shows_dtypes_and_shapes_not_values() -> None:
    topk = make(2, 3, per_row=PER_ROW[1:2]).to(torch.bfloat16)
    shown = "ids=int32[2, 3, 4], logits=bfloat16[2, 3, 4], tail_logsumexp=bfloat16[2, 3]"
    assert repr(topk) == f"TopK({shown}, temperature=0.75, device=cpu)"
    topk = TopK(topk.ids, topk.logits)
    assert repr(topk) == "TopK(ids=int32[2, 3, 4], logits=bfloat16[2, 3, 4], device=cpu)"
    assert len(repr(make(100, 100))) < 210


def test_equality_is_identity_so_that_supports_can_be_keys() -> None:
    topk = make(2)
    assert topk == topk
    assert topk != make(2)
    assert {topk: 1}[topk] == 1


# torch.compile


def test_compiled_functions_take_index_and_return_supports() -> None:
    def step(student: torch.Tensor, topk: TopK) -> tuple[torch.Tensor, TopK, TopK, TopK]:
        halved = dataclasses.replace(topk, logits=topk.logits / 2)
        joined = TopK.cat([topk[:1], halved[1:]])
        return topk_rkl(student, topk), joined.to(torch.bfloat16), topk[..., 0], topk.reshape(-1)

    student, topk = torch.randn(2, 3, 50), make(2, 3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(student, topk), step(student, topk), strict=True):
        if isinstance(expected, TopK):
            assert_same(got, expected)
        else:
            assert torch.equal(got, expected)


def test_compiled_functions_select_supports() -> None:
    teacher, mask = torch.randn(2, 3, 50), torch.tensor([[True, False, True], [True, True, False]])

    def select(logits: torch.Tensor, mask: torch.Tensor) -> TopK:
        return select_topk(logits, 4, mask=mask, with_logsumexp=True)

    got = torch.compile(select, fullgraph=True, backend="aot_eager")(teacher, mask)
    expected = select(teacher, mask)
    assert torch.equal(got.ids, expected.ids)
    assert torch.equal(got.logits, expected.logits)
    torch.testing.assert_close(got.logsumexp, expected.logsumexp)
    assert (got.logsumexp[~mask] == 0).all()
