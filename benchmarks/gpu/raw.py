"""The CUDA kernels through raw pointers, without torch: what a sanitizer runs in seconds.

Every array has an allocation of its own, whose end the sanitizer knows. Results are compared with
numpy: ids and values that are selected or gathered exactly, loss and gradients within float32's
rounding. With ``--device cpu`` the emulated kernels run on numpy's memory.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# Rows, vocabulary, K, dtype: a cluster for each row, large blocks, many small ones; odd widths.
SHAPES = (
    (2, 140001, 16, "bfloat16"),
    (2, 9001, 1024, "float32"),
    (3, 9001, 300, "float16"),
    (300, 2003, 64, "bfloat16"),
)
DRY_SHAPES = ((2, 9001, 16, "bfloat16"), (2, 2003, 300, "float32"), (9, 1003, 64, "float16"))
PRIMARY, POINTER = ctypes.c_void_p, ctypes.c_uint64


class Cuda:
    """Memory of the first GPU, by the driver's own functions."""

    def __init__(self) -> None:
        """Takes the context that the CUDA runtime takes."""
        self.driver = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        context, device = PRIMARY(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.driver, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} returns {code}")

    def put(self, array: np.ndarray) -> int:
        """The address of a copy."""
        address = POINTER()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(array.nbytes))
        data, size = array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyHtoD_v2", address, data, size)
        return int(address.value)

    def get(self, array: np.ndarray, address: int) -> np.ndarray:
        """Copies back, and frees."""
        self._call("cuCtxSynchronize")
        data, size = array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoH_v2", data, POINTER(address), size)
        self._call("cuMemFree_v2", POINTER(address))
        return array

    def attribute(self, number: int) -> int:
        """An attribute of the device, by the driver's number."""
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value


class Host:
    """Numpy's memory as it is, for emulated kernels."""

    def __init__(self) -> None:
        """Keeps what has an address."""
        self.kept: dict[int, np.ndarray] = {}

    def put(self, array: np.ndarray) -> int:
        """The address of a copy."""
        copy = array.copy()
        self.kept[copy.ctypes.data] = copy
        return copy.ctypes.data

    def get(self, array: np.ndarray, address: int) -> np.ndarray:
        """What is there now."""
        array[...] = self.kept.pop(address)
        return array


def load(device: str) -> tuple[Any, Any, Any]:
    """(module, memory, the device as launchers take it)."""
    if device == "cpu":
        sys.path.insert(0, str(ROOT / "tests" / "helpers"))
        import emulated

        emulated.install()
        module = emulated.cuda.backend.module
        return module, Host(), emulated.pretended(8)
    path = ROOT / "opd_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    memory = Cuda()
    multiprocessors, shared, major = (memory.attribute(number) for number in (16, 81, 75))
    sizes = range(2, module.max_cluster + 1)
    clusters = [module.max_clusters(0, size) if major >= 9 else 0 for size in sizes]
    return module, memory, module.Device(0, multiprocessors, shared, clusters, 0)


def bits_of(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(what kernels read, the values it stands for in float64)."""
    if dtype == "bfloat16":
        bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    rounded = values.astype(dtype)
    return rounded, rounded.astype(np.float64)


class Trial:
    """Random logits of a shape, some ids banned, every third row masked."""

    def __init__(self, loaded: tuple[Any, Any, Any], rows: int, vocab: int, k: int, dtype: str):
        """Puts the inputs where the kernels find them."""
        self.module, self.memory, self.device = loaded
        self.rows, self.vocab, self.k, self.dtype = rows, vocab, k, dtype
        random = np.random.default_rng(rows + vocab + k)
        self.student_bits, self.student = bits_of(random.normal(0, 3, (rows, vocab)), dtype)
        self.teacher_bits, self.teacher = bits_of(random.normal(0, 3, (rows, vocab)), dtype)
        self.mask = np.arange(rows) % 3 != 1
        banned = np.zeros(-(-vocab // 64) * 64, dtype=bool)
        banned[:vocab:7] = True
        self.banned, self.bitmap = banned[:vocab], np.packbits(banned, bitorder="little")
        allowed = np.where(self.banned, -np.inf, self.teacher)
        self.ids = np.argsort(-allowed, axis=1, kind="stable")[:, :k]

    def struct(self, array: np.ndarray, dtype: str, address: int) -> Any:
        """Rows of an array."""
        width = array.shape[1]
        return self.module.Rows(address, dtype, array.shape, (width, 1))

    def allowed(self) -> Any:
        """The ids and rows that count."""
        return self.module.Allowed(
            self.vocab, self.memory.put(self.bitmap), self.memory.put(self.mask)
        )

    def outputs(self) -> list[tuple[np.ndarray, int]]:
        """(loss, ids, gradients), each with its address."""
        shapes = ((self.rows,), np.float32), ((self.rows, self.k), np.int32)
        arrays = [np.full(shape, 7, kind) for shape, kind in (*shapes, (shapes[1][0], np.float32))]
        return [(array, self.memory.put(array)) for array in arrays]

    def select(self) -> None:
        """Ids and values, exactly."""
        _, ids, values = self.outputs()
        logits = self.struct(self.teacher, self.dtype, self.memory.put(self.teacher_bits))
        self.module.select(self.device, logits, self.allowed(), self.k, ids[1], values[1])
        expected = np.take_along_axis(self.teacher, self.ids, 1)
        rows = self.mask
        assert (self.memory.get(*ids)[rows] == self.ids[rows]).all()
        assert (self.memory.get(*values)[rows] == expected[rows]).all()
        assert (ids[0][~rows] == -1).all()

    def gather(self) -> None:
        """The student's values at ids and the slots, exactly; ids outside of the vocabulary."""
        _, slots, values = self.outputs()
        ids = np.random.default_rng(self.k).integers(-2, self.vocab + 2, self.ids.shape)
        self.module.gather(
            self.device,
            self.struct(self.student, self.dtype, self.memory.put(self.student_bits)),
            self.struct(ids, "int64", self.memory.put(ids)),
            self.allowed(), values[1], slots[1],
        )  # fmt: skip
        inside = (ids >= 0) & (ids < self.vocab) & self.mask[:, None]
        ids = np.where(inside, ids, 0)
        present = inside & ~self.banned[ids]
        expected = np.where(present, np.take_along_axis(self.student, ids, 1), 0)
        assert (self.memory.get(*values) == expected).all()
        assert (self.memory.get(*slots) == np.where(present, np.arange(self.k), -1)).all()

    def divergence(self, given: bool) -> None:
        """Loss and entry gradients, the support selected or given; then the dense gradient."""
        loss, ids, grad = self.outputs()
        student = self.struct(self.student, self.dtype, self.memory.put(self.student_bits))
        plain = self.module.Divergence(1, 0, 0, 0, 0.5, False, None, None)
        objective = self.module.Objective(1.5, 0, 1.0, 0, plain, 0, "renormalize")
        results = loss[1], ids[1], grad[1]
        if given:
            values = np.take_along_axis(self.teacher, self.ids, 1).astype(np.float32)
            given_ids = self.ids.astype(np.int32)
            self.module.entry_divergence(
                self.device, student,
                self.struct(values, "float32", self.memory.put(values)),
                self.struct(given_ids, "int32", self.memory.put(given_ids)),
                self.allowed(), objective, *results,
            )  # fmt: skip
        else:
            self.module.select_divergence(
                self.device, student,
                self.struct(self.teacher, self.dtype, self.memory.put(self.teacher_bits)),
                self.allowed(), self.k, objective, *results,
            )  # fmt: skip
        p, log_p = softmax(np.take_along_axis(self.student, self.ids, 1) / 1.5)
        _, log_q = softmax(np.take_along_axis(self.teacher, self.ids, 1))
        expected = (p * (log_p - log_q)).sum(1)
        entries = p * (log_p - log_q - expected[:, None]) / 1.5
        rows = self.mask
        found, found_ids, found_grad = (self.memory.get(*output) for output in (loss, ids, grad))
        np.testing.assert_allclose(found[rows], expected[rows], rtol=1e-4, atol=1e-5)
        assert (found[~rows] == 0).all()
        order = np.argsort(found_ids, axis=1), np.argsort(self.ids, axis=1)
        ours, theirs = (
            np.take_along_axis(array, by, 1)
            for array, by in zip((found_grad, entries), order, strict=True)
        )
        np.testing.assert_allclose(ours[rows], theirs[rows], rtol=1e-3, atol=1e-6)
        self.scatter(found_ids, found_grad)

    def bucket(self) -> None:
        """Tails of both sides, the divergence of full softmaxes, and a gradient's background."""
        loss, ids, grad = self.outputs()
        values = self.outputs()[2]
        student, teacher = (
            self.struct(bits, self.dtype, self.memory.put(bits))
            for bits in (self.student_bits, self.teacher_bits)
        )
        sums = [np.full(self.rows, 7.0) for _ in range(4)]  # both sides' tails and entropies
        tail_t, entropy_t, tail_s, entropy_s = (self.memory.put(array) for array in sums)
        over = self.module.Tail(self.vocab, 1.0, 0, None, tail_t, entropy_t)
        arguments = teacher, self.allowed(), self.k, ids[1], values[1], over
        self.module.select_with_tail(self.device, *arguments)
        listed = self.module.Rows(ids[1], "int32", (self.rows, self.k), (self.k, 1))
        over = self.module.Tail(self.vocab, 1.5, 0, listed, tail_s, entropy_s)
        self.module.tail_logsumexp(self.device, student, self.memory.put(self.mask), over)
        plain = self.module.Divergence(1, 0, 0, 0, 0.5, False, None, None)
        factors, total = np.full(self.rows, 7, np.float32), np.full(self.rows, 7.0)
        rest = self.memory.put(factors), self.memory.put(total)
        out = (loss, (np.full_like(ids[0], 7), self.memory.put(ids[0])), grad)
        self.module.full_divergence(
            self.device, student,
            self.module.Rows(values[1], "float32", (self.rows, self.k), (self.k, 1)), listed,
            self.allowed(), self.module.Objective(1.5, 0, 1.0, 0, plain, 0, "bucket"),
            tail_t, tail_s, self.vocab, *(address for _, address in out), *rest,
        )  # fmt: skip
        upstream = np.linspace(0.5, 2, self.rows, dtype=np.float32)
        written = np.zeros_like(self.teacher_bits)
        dense = self.memory.put(written)
        self.module.scatter_background(
            self.device, self.struct(written, self.dtype, dense), out[1][1], grad[1],
            self.memory.put(upstream), self.k, "clear", student, *rest, self.vocab, 1.5, 0,
        )  # fmt: skip

        inside = np.zeros((self.rows, self.vocab), dtype=bool)
        np.put_along_axis(inside, self.ids, True, 1)
        logs = [softmax(side)[1] for side in (self.student / 1.5, self.teacher)]
        p, q = (np.exp(log) for log in logs)
        p_tail, q_tail = (np.where(inside, 0, side).sum(1) for side in (p, q))
        terms = np.where(inside, p * (logs[0] - logs[1]), 0)
        ratio = np.log(p_tail) - np.log(q_tail)
        expected = terms.sum(1) + p_tail * ratio
        entries = np.where(inside, p * (logs[0] - logs[1] - expected[:, None]), 0)
        gradient = (entries + np.where(inside, 0, p * (ratio - expected)[:, None])) / 1.5
        rows = self.mask
        found_sums = [self.memory.get(*pair) for pair in zip(
            sums, (tail_t, entropy_t, tail_s, entropy_s), strict=True
        )]  # fmt: skip
        for side, place in ((self.teacher, 0), (self.student / 1.5, 2)):
            outside = np.where(inside, -np.inf, side)
            wanted = logsumexp(outside)
            own = np.where(inside, 0, np.exp(outside - wanted[:, None]))
            entropy = -np.sum(own * np.where(inside, 0, side - wanted[:, None]), axis=1)
            np.testing.assert_allclose(found_sums[place][rows], wanted[rows], atol=2e-6)
            np.testing.assert_allclose(found_sums[place + 1][rows], entropy[rows], rtol=1e-5)
            assert (found_sums[place][~rows] == 0).all()
        found = self.memory.get(*loss)
        np.testing.assert_allclose(found[rows], expected[rows], rtol=1e-4, atol=1e-5)
        assert (found[~rows] == 0).all()
        got = widened(self.memory.get(written, dense), self.dtype)
        wanted = np.where(rows[:, None], upstream[:, None] * gradient, 0)
        np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=1e-6)

    def scatter(self, ids: np.ndarray, entries: np.ndarray) -> None:
        """Every mode of the gradient's kernel."""
        upstream = np.linspace(0.5, 2, self.rows, dtype=np.float32)
        for mode in ("clear", "add"):
            before = np.zeros_like(self.teacher_bits)
            if mode == "clear":  # what is there does not count
                before = before + bits_of(np.ones(1), self.dtype)[0]
            address = self.memory.put(before)
            self.module.scatter(
                self.device, self.struct(before, self.dtype, address), self.memory.put(ids),
                self.memory.put(entries), self.memory.put(upstream), self.k, mode,
            )  # fmt: skip
            got = self.memory.get(before, address)
            found = widened(got, self.dtype)
            expected = np.zeros((self.rows, self.vocab))
            at = np.nonzero(ids >= 0)
            expected[at[0], ids[at]] = (upstream[:, None] * entries)[at]
            np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-6)


def widened(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values that bits of a dtype stand for."""
    if dtype != "bfloat16":
        return bits
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def logsumexp(values: np.ndarray) -> np.ndarray:
    """Of each row."""
    most = values.max(1)
    return most + np.log(np.exp(values - most[:, None]).sum(1))


def softmax(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(softmax, its logarithm) of each row."""
    shifted = values - values.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return np.exp(log_p), log_p


def main(arguments: Sequence[str] | None = None) -> int:
    """Every kernel at every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="a GPU, or the CPU for a dry run in the emulation (default: cuda)",
    )
    options = parser.parse_args(arguments)
    loaded = load(options.device)
    shapes = SHAPES if options.device == "cuda" else DRY_SHAPES
    for shape in shapes:
        print(*shape, flush=True)
        trial = Trial(loaded, *shape)
        trial.select()
        trial.gather()
        for given in (False, True):
            trial.divergence(given)
        trial.bucket()
    print(f"{len(shapes)} shapes are right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
