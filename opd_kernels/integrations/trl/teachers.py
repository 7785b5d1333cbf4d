"""The trainer's teacher: checks, loading, and the comparison of tokenizers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoTokenizer
from trl.trainer.utils import create_model_from_path

from opd_kernels.divergences import RENORMALIZE
from opd_kernels.integrations.server import TeacherServer
from opd_kernels.integrations.trl.config import TopKDistillationConfig
from opd_kernels.tokens.tokenizers import compare_tokenizers


def check_one_teacher(teacher_model: Any, teacher_server: Any, args: Any) -> None:
    """The teacher is given in one way, and every option about it has an effect."""
    given = {
        "teacher_model": teacher_model,
        "args.teacher_model_name_or_path": args.teacher_model_name_or_path,
        "teacher_server": teacher_server,
        "args.teacher_server_url": args.teacher_server_url,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            f"the teacher is given as {' and '.join(names) or 'nothing'}, expected one of "
            f"{', '.join(given)}"
        )
    by_name = isinstance(teacher_model or args.teacher_model_name_or_path, str)
    for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
        if getattr(args, name) is not None and not by_name:
            raise ValueError(
                f"args.{name} is for a teacher that is loaded by name, {names[0]} is given; leave "
                "it out"
            )
    by_server = teacher_server is not None or args.teacher_server_url is not None
    if by_server and (args.loss == "sample" or args.support == "student"):
        what = 'loss="sample"' if args.loss == "sample" else 'support="student"'
        raise ValueError(
            f"{what} needs the teacher's values at the student's tokens, which its server does not "
            "give; use a teacher_model"
        )
    own = args.temperature if args.teacher_temperature is None else args.teacher_temperature
    if by_server and args.loss != RENORMALIZE and own != 1:
        raise ValueError(
            f"loss={args.loss!r} needs the teacher's full softmax, which a server gives at "
            f"temperature 1, and the teacher's is {own}; set teacher_temperature=1.0, or "
            'loss="renormalize"'
        )
    if teacher_server is not None and teacher_server.k != args.k:
        raise ValueError(
            f"teacher_server asks for {teacher_server.k} entries, args.k is {args.k}; make them one"
        )


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """The teacher, which is frozen, shares no trained parameter with the student."""
    frozen = {id(parameter) for parameter in teacher.parameters()}
    shared = [n for n, p in student.named_parameters() if p.requires_grad and id(p) in frozen]
    if shared:
        raise ValueError(
            f"the teacher shares {len(shared)} parameters with the student that are trained, "
            f"{shared[0]} for one; give it a copy (copy.deepcopy), or load it a second time"
        )


def check_k(k: int, banned_ids: Sequence[int], vocab_size: int) -> None:
    """At least k ids can be selected: they are below ``vocab_size`` and not banned."""
    banned = sum(1 for i in set(banned_ids) if i < vocab_size)
    if k > vocab_size - banned:
        raise ValueError(
            f"k is {k}, allowed is at most {vocab_size - banned}, the ids below {vocab_size} that "
            "are not banned"
        )


def server_of(url: str, args: TopKDistillationConfig) -> TeacherServer:
    """A client for the server that the options describe."""
    return TeacherServer(
        url,
        args.teacher_server_model,
        args.k,
        api=args.teacher_server_api,
        timeout=args.teacher_server_timeout,
        retries=args.teacher_server_retries,
        parallel=args.teacher_server_parallel,
    )


def loaded(name: str, args: TopKDistillationConfig) -> nn.Module:
    """Loads a model by its name or folder."""
    options: dict[str, Any] = {
        "dtype": "auto",
        "trust_remote_code": args.trust_remote_code,
        "revision": args.teacher_model_revision or "main",
        **(args.teacher_model_init_kwargs or {}),
    }
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    return create_model_from_path(name, **options)


def tokenizer_of(name: str, args: TopKDistillationConfig) -> Any:
    """The tokenizer beside a model; None, with a warning, where there is none."""
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=args.teacher_model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError):
        warnings.warn(
            f"no tokenizer is found beside the teacher {name!r}, so its ids are not compared with "
            "the student's; pass teacher_processing_class",
            stacklevel=3,
        )
        return None


def eos_ids_of(model: Any) -> Any:
    """The ids that end a sequence of a model: one, several or None."""
    return getattr(getattr(model, "generation_config", None), "eos_token_id", None)


def warn_if_different(
    student: Any, teacher: Any, student_eos_ids: Any, teacher_eos_ids: Any
) -> None:
    """Warns if two tokenizers give ids different meanings or the models stop at different ids."""
    comparison = compare_tokenizers(
        student,
        getattr(teacher, "tokenizer", teacher),
        student_eos_ids=student_eos_ids,
        teacher_eos_ids=teacher_eos_ids,
    )
    if not comparison.identical:
        warnings.warn(
            "student and teacher have different tokenizers; masked_ids, banned_ids and vocab_size "
            f"leave out what differs (opd_kernels.compare_tokenizers):\n{comparison}",
            stacklevel=3,
        )
