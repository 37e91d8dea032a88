"""Stand-ins for packages that a user may have installed: the signatures that theirs have, computed in plain torch.

They refuse what the real kernels refuse or silently copy: channels that are no multiple of 8, unequal head dims where
the package knows one, strides that are no multiple of 8 or not unit last.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from yolo_flash.backends import installed as backends_installed
from yolo_flash.kernels import installed

NAMES = tuple(installed.PACKAGES)
ONE_HEAD_DIM = ("flash_attn_2", "flash_attn_3")


class Calls:
    """What a stand-in was called with."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.forward: list[dict[str, Any]] = []
        self.backward: list[dict[str, Any]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of `[batch, seq_len, num_heads, channels]`, and the statistics in float32."""
        self._hold(q, k, v)
        self.forward.append({"q": q, "k": k, "v": v, "scale": scale})
        scores = torch.einsum("bqhd,bkhd->bhqk", *_high(q, k)) * scale
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), *_high(v))
        return out.to(q.dtype), scores.logsumexp(-1).to(torch.float32)

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._hold(dout, q, k, v, out)
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        assert lse.dtype is torch.float32
        self.backward.append({"deterministic": deterministic, "scale": scale})
        dout, q, k, v, out = _high(dout, q, k, v, out)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        weights = (scores - lse.double().unsqueeze(-1)).exp()
        dv = torch.einsum("bhqk,bqhd->bkhd", weights, dout)
        delta = (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
        dscores = weights * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - delta) * scale
        return torch.einsum("bhqk,bkhd->bqhd", dscores, k), torch.einsum("bhqk,bqhd->bkhd", dscores, q), dv

    def _hold(self, *tensors: Tensor) -> None:
        dims = {t.shape[-1] for t in tensors}
        assert all(dim % 8 == 0 for dim in dims), dims
        if self.name in ONE_HEAD_DIM:
            assert len(dims) == 1, dims
        for t in tensors:
            assert t.ndim == 4
            assert t.stride(-1) == 1
            assert all(stride % 8 == 0 for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size > 1)


def _high(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double() for t in tensors]


@contextlib.contextmanager
def installed_package(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The package of a backend as if it were installed, and what is called of it."""
    calls = Calls(name)
    forget(monkeypatch)
    with contextlib.ExitStack() as stack:
        if name == "flash_attn_3":
            stack.enter_context(_fa3_operators(calls))
        parts = installed.PACKAGES[name].module.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        for function, stand_in in _FUNCTIONS[name](calls).items():
            setattr(sys.modules[installed.PACKAGES[name].module], function, stand_in)
        yield calls
        forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was imported so far."""
    installed.load.cache_clear()
    backends_installed.import_problem.cache_clear()


def _fa2(calls: Calls) -> dict[str, Any]:
    """Of flash-attn 2.8.3, whose functions have no defaults."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> tuple[Tensor, ...]:
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None
        assert not return_softmax
        return *calls.attend(q, k, v, softmax_scale), torch.empty(0), torch.empty(2)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        grads = calls.differentiate(dout, q, k, v, out, softmax_lse, softmax_scale, deterministic)
        for mine, grad in zip((dq, dk, dv), grads, strict=True):
            mine.copy_(grad)
        return softmax_lse

    return {"_flash_attn_forward": forward, "_flash_attn_backward": backward}


def _fa4(calls: Calls) -> dict[str, Any]:
    """Of flash-attn-4 4.0.0b36, as far as attention without a mask goes."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Any, ...]:
        assert softmax_scale is not None
        assert return_lse  # it allocates none where no gradient is asked for
        return *calls.attend(q, k, v, softmax_scale), None, None, None

    def backward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        deterministic: bool = False,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        assert softmax_scale is not None
        grads = calls.differentiate(dout, q, k, v, out, lse, softmax_scale, deterministic)
        for like, mine, grad in zip((q, k, v), (dq, dk, dv), grads, strict=True):
            assert mine is not None
            assert (mine.shape, mine.dtype) == (like.shape, like.dtype)
            mine.copy_(grad)
        return grads

    return {"_flash_attn_fwd": forward, "_flash_attn_bwd": backward}


def _xformers(calls: Calls) -> dict[str, Any]:
    """Of xformers 0.0.35, with statistics that are padded as CUTLASS' are."""

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
        output_dtype: Any = None,
    ) -> tuple[Tensor, Tensor]:
        assert scale is not None
        out, lse = calls.attend(query, key, value, scale)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))

    def backward(
        grad: Tensor,
        output: Tensor,
        lse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
    ) -> tuple[Tensor, ...]:
        assert scale is not None
        flag = torch.are_deterministic_algorithms_enabled()
        grads = calls.differentiate(grad, query, key, value, output, lse, scale, flag)
        return tuple(found.to(query.dtype) for found in grads)

    return {
        "memory_efficient_attention_forward_requires_grad": forward,
        "memory_efficient_attention_backward": backward,
    }


_FUNCTIONS: dict[str, Any] = {
    "flash_attn_2": _fa2,
    "flash_attn_3": lambda calls: {},
    "flash_attn_4": _fa4,
    "xformers": _xformers,
}


@contextlib.contextmanager
def _fa3_operators(calls: Calls) -> Iterator[None]:
    """The operators of the hopper build, by its schema."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *others: Any, **keywords: Any) -> tuple[Tensor, ...]:
        given = dict(zip([argument.name for argument in schema("fwd")[3:]], others, strict=False)) | keywords
        assert given.pop("num_splits") == 1
        scale = given.pop("softmax_scale")
        assert set(given.values()) <= {None, False, -1}, given
        return *calls.attend(q, k, v, scale), torch.empty(0), torch.empty(0)

    def backward(*tensors: Any, **keywords: Any) -> tuple[Tensor, ...]:
        dout, q, k, v, out, lse, dq, dk, dv = tensors[:9]
        others = dict(zip([argument.name for argument in schema("bwd")[9:]], tensors[9:], strict=False)) | keywords
        scale, deterministic = others.pop("softmax_scale"), others.pop("deterministic", False)
        assert set(others.values()) <= {None, False, -1}, others
        grads = calls.differentiate(dout, q, k, v, out, lse, scale, deterministic)
        for mine, grad in zip((dq, dk, dv), grads, strict=True):
            mine.copy_(grad)
        return tuple(torch.empty(0) for _ in range(5))

    def schema(name: str) -> list[Any]:
        arguments: list[Any] = getattr(torch.ops.flash_attn_3, name).default._schema.arguments
        return arguments

    optional = "Tensor? {}=None"
    names = ["cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k"]
    with torch.library._scoped_library("flash_attn_3", "DEF") as library:
        library.define(
            f"fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
            f"Tensor? q_v=None, Tensor(out!)? out=None, {', '.join(map(optional.format, names))}, "
            f"int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, "
            f"Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
            f"Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, "
            f"bool is_causal=False, int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, "
            f"float softcap=0., bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
            f"bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
        )
        library.define(
            "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
            "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
            "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
            "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
            "float softcap=0., bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
        )
        library.impl("fwd", forward, "CompositeExplicitAutograd")
        library.impl("bwd", backward, "CompositeExplicitAutograd")
        yield
    for name in ("fwd", "bwd"):  # torch.ops keeps what it found
        vars(torch.ops.flash_attn_3).pop(name, None)
