"""Our Triton kernels against float64: on a CPU through Triton's interpreter, on a GPU for real.

The interpreter multiplies no bfloat16, and float32, which the kernels take but the backend refuses, gives tight bounds.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.versions import needs_triton
from yolo_flash.kernels import area, operators

needs_triton()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about the infinities that are meant
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16
PRECISE = torch.float32 if DEVICE == "cpu" else HALF  # float32 takes Triton a minute to compile for a GPU
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def packed(groups: int, tokens: int, heads: int, dim: int, dim_v: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(groups, tokens, heads, 2 * dim + dim_v).to(DEVICE, dtype)


def area_attention(qkv: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Attention and the copy of v."""
    out, image, _ = operators.call("area_attention", qkv, dim)
    return out, image


def exact(qkv: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Attention and v in float64, in the plainest words."""
    q, k, v = qkv.double().split([dim, dim, qkv.shape[-1] - 2 * dim], dim=-1)
    weights = torch.einsum("gqhd,gkhd->ghqk", q, k).mul(dim**-0.5).softmax(-1)
    return torch.einsum("ghqk,gkhd->gqhd", weights, v), v


def gradient(function: Any, qkv: Tensor, dim: int, dout: Tensor, dimage: Tensor) -> tuple[Tensor, Tensor]:
    """Output of a function and the gradient of its packed input."""
    leaf = qkv.detach().clone().requires_grad_()
    out, image = function(leaf, dim)
    (grad,) = torch.autograd.grad([out, image], [leaf], [dout.to(out.dtype), dimage.to(out.dtype)])
    return out.detach(), grad


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def check(qkv: Tensor, dim: int, bound: float) -> None:
    """Output, copy of v and gradient of every part within a relative error."""
    dim_v = qkv.shape[-1] - 2 * dim
    dout, dimage = (torch.randn(*qkv.shape[:3], dim_v, device=DEVICE).to(qkv.dtype) for _ in range(2))
    out, grad = gradient(area_attention, qkv, dim, dout, dimage)
    truth, truth_grad = gradient(exact, qkv, dim, dout, dimage)
    image = area_attention(qkv, dim)[1]
    assert torch.equal(image, qkv[..., 2 * dim :])
    assert image.is_contiguous()
    assert out.is_contiguous()
    assert error(out, truth) < bound
    scale = truth_grad.norm()
    for part, expected in zip(
        grad.double().split([dim, dim, dim_v], -1), truth_grad.split([dim, dim, dim_v], -1), strict=True
    ):
        assert float((part - expected).norm() / scale) < bound


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 32, 32),  # one token
        (2, 16, 1, 32, 32),
        (1, 64, 2, 32, 32),  # a whole tile and no rest
        (2, 100, 2, 32, 32),  # a rest of 36 in a tile of 64
        (1, 129, 1, 32, 32),  # two tiles and a token
        (3, 65, 1, 32, 64),  # PSA
        (1, 70, 2, 36, 72),  # PSA of YOLOv10m: no powers of two
        (1, 33, 1, 16, 16),
        (1, 40, 1, 64, 64),
        (1, 40, 1, 128, 128),
        (1, 20, 3, 24, 48),
    ],
    ids=str,
)
def test_equals_float64(shape: tuple[int, int, int, int, int]) -> None:
    if PRECISE is torch.float32:
        check(packed(*shape, dtype=PRECISE), shape[3], 1e-6)
    check(packed(*shape), shape[3], 1e-3)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    groups=st.integers(1, 3),
    tokens=st.integers(1, 150),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 20, 32, 36, 64]),
    dim_v=st.sampled_from([16, 32, 40, 64]),
)
def test_equals_float64_for_any_shape(groups: int, tokens: int, heads: int, dim: int, dim_v: int) -> None:
    check(packed(groups, tokens, heads, dim, dim_v), dim, 1e-3)


def hard_inputs() -> dict[str, Tensor]:
    """Inputs on which a softmax goes wrong that is not careful: 130 tokens are two tiles of 64 and one of 2."""
    torch.manual_seed(3)
    base = packed(1, 130, 2, 32, 32)
    large, constant, first, last = (base.clone() for _ in range(4))
    large[..., :64] *= 60  # scores of 1e5, which float16 does not hold
    constant[..., 32:64] = 0.25
    first[..., :32].abs_()
    first[:, 1, :, 32:64] = 30  # one dominating key, in the first tile that is taken
    last[..., :32].abs_()
    last[:, 129, :, 32:64] = 30  # and in the last: the tile sets its maximum from it
    middle = base.clone()
    middle[..., :32].abs_()
    middle[:, 70, :, 32:64] = 30  # in neither: the sums overflow, and the tile is computed again
    low = base.clone()  # all scores far below 0, that of the padding
    low[..., :32] = low[..., :32].abs() + 5
    low[..., 32:64] = -low[..., 32:64].abs() - 5
    return {"large": large, "constant": constant, "first": first, "last": last, "middle": middle, "low": low}


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu compares with flash, which multiplies as coarsely as we do")
@pytest.mark.parametrize("name", hard_inputs())
def test_hard_inputs_are_as_exact_as_in_plain_half_precision(name: str) -> None:
    qkv = hard_inputs()[name]
    dout, dimage = torch.randn(2, 1, 130, 2, 32, device=DEVICE).to(HALF)

    def plain(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        q, k, v = t.split(dim, dim=-1)
        weights = (torch.einsum("gqhd,gkhd->ghqk", q.float(), k.float()) * dim**-0.5).softmax(-1).to(t.dtype)
        return torch.einsum("ghqk,gkhd->gqhd", weights.float(), v.float()).to(t.dtype), v

    truth, truth_grad = gradient(exact, qkv, 32, dout, dimage)
    half, half_grad = gradient(plain, qkv, 32, dout, dimage)
    out, grad = gradient(area_attention, qkv, 32, dout, dimage)
    eps = torch.finfo(HALF).eps
    assert error(out, truth) <= 1.5 * error(half, truth) + eps / 2
    assert error(grad, truth_grad) <= 2 * error(half_grad, truth_grad) + eps / 2


def test_infinities_and_nans_stay_where_the_reference_has_them() -> None:
    """A group is spoilt by its own tokens alone, and as float64 is: a key of -inf has no weight, a NaN spreads."""
    qkv = packed(6, 130, 1, 32, 32)
    qkv[..., :32].abs_()
    qkv[5, :, :, 32:64] = -3.0
    qkv[5, :64, :, 32:64] = -math.inf  # for the first tile, and far below 0 for the others
    qkv[1, 70, :, 32:64] = -math.inf  # scores of -inf for one key
    qkv[2, 128:, :, 32:64] = -math.inf  # for all keys of the first tile
    qkv[3, 3, 0, 40] = math.nan
    qkv[4, :, :, 32:64] = -math.inf  # for all keys: 0/0
    out = area_attention(qkv, 32)[0]
    truth = exact(qkv, 32)[0]
    assert torch.equal(out.isfinite(), truth.isfinite())
    finite = truth.isfinite()
    assert finite[[0, 1, 2, 5]].all()
    assert not finite[3:5].any()
    assert error(out[finite], truth[finite]) < 1e-3


def test_gradients_of_keys_of_minus_infinity_are_finite_where_float64_has_them_finite() -> None:
    qkv = packed(2, 130, 1, 32, 32)
    qkv[..., :32].abs_()
    qkv[0, 70, :, 32:64] = -math.inf
    dout, dimage = torch.randn(2, 2, 130, 1, 32, device=DEVICE).to(HALF)
    grad = gradient(area_attention, qkv, 32, dout, dimage)[1]
    truth = gradient(exact, qkv, 32, dout, dimage)[1]
    finite = truth.isfinite()
    assert finite[1].all()
    assert finite[..., 32:].all()  # of k and v; q's is 0 * inf
    assert grad[finite].isfinite().all()
    assert error(grad[finite], truth[finite]) < 2e-3


def test_a_second_derivative_is_refused_and_not_dropped() -> None:
    leaf = packed(1, 20, 1, 32, 32).requires_grad_()
    out = area_attention(leaf, 32)[0]
    (grad,) = torch.autograd.grad(out.float().pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no gradient of its gradient.*flash\.backend=sdpa_math"):
        grad.float().pow(2).sum().backward()


def test_what_is_no_packed_tensor_is_refused() -> None:
    for shape, dim, told in (
        ((2, 20, 96), 32, r"expected \[groups, seq_len, num_heads, .*found \[2, 20, 96\]"),
        ((2, 20, 1, 96), 48, "with head_dim 48"),
        ((2, 20, 1, 96), 0, "with head_dim 0"),
        ((1, 20, 1, 32 + 32 + 136), 32, "head dims go up to 128, found 136"),
    ):
        for device in (DEVICE, "meta"):
            with pytest.raises(ValueError, match=told):
                area_attention(torch.zeros(shape, dtype=HALF, device=device), dim)


def test_the_backward_is_tried_once_on_one_head() -> None:
    area._try_backward.cache_clear()
    for _ in range(2):
        area._try_backward(33, 96, 32, HALF, torch.device(DEVICE))
    assert area._try_backward.cache_info().misses == 1


def test_kernels_are_compiled_ahead_once_each_and_what_fails_is_left_to_the_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched, launch = [], area.launch

    def record(kernel: area.Kernel, qkv: Tensor, *rest: Any) -> None:
        launched.append((kernel, qkv.shape[1], qkv.dtype))
        if kernel == "area_backward_kv":
            raise RuntimeError("out of resource: shared memory")
        launch(kernel, qkv, *rest)

    monkeypatch.setattr(area, "launch", record)
    train, val = area.Problem(80, 32, 32, HALF, True), area.Problem(144, 32, 32, HALF, False)
    area.compile_ahead([train, val, train], torch.device(DEVICE))  # both are whole tiles and a rest of 16
    assert sorted(launched) == [(f"area_{name}", 80, HALF) for name in ("backward_kv", "backward_q", "forward")]
    launched.clear()
    area.compile_ahead([val, area.Problem(128, 32, 64, HALF, False)], torch.device(DEVICE))
    assert sorted(launched) == [("area_forward", 128, HALF), ("area_forward", 144, HALF)]


def test_a_second_launch_goes_to_the_compiled_kernel() -> None:
    """With every argument, in order: a kernel has no keywords any more."""
    launches: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = []

    class Kernel:
        def __init__(self, name: str, compiled: Any) -> None:
            self.name, self.compiled = name, compiled

        def __getitem__(self, grid: Any) -> Any:
            def run(*args: Any, **options: Any) -> Any:
                launches.append((self.name, grid, args, options))
                return self.compiled

            return run

    tensors = (torch.ones(1),)
    start = area._Launcher(Kernel("jit", Kernel("compiled", None)), 5, (1, 2, 0.5, 32), {"num_warps": 4})
    for _ in range(3):
        start(tensors)
    arguments = (*tensors, 1, 2, 0.5, 32)
    assert launches == [
        ("jit", (5, 1, 1), arguments, {"num_warps": 4}),
        ("compiled", (5, 1, 1), arguments, {}),
        ("compiled", (5, 1, 1), arguments, {}),
    ]


@pytest.mark.parametrize("kernel", ["area_forward", "area_backward_q", "area_backward_kv"])
def test_arguments_are_in_the_order_of_the_signature(kernel: area.Kernel) -> None:
    from yolo_flash.kernels import area_triton

    names = list(inspect.signature(getattr(area_triton, kernel).fn).parameters)
    shape = (2, 100, 3, 2 * 24 + 40)
    start = area._prepare(kernel, shape, 24, 0 if DEVICE == "cuda" else None, (), area.Tiles(64, 32, 4, 3))
    assert dict(zip(names[-13:], start._arguments, strict=True)) == {
        "seq_len": 100,
        "num_heads": 3,
        "scale": math.log2(math.e) * 24**-0.5,
        "DIM": 24,
        "DIM_V": 40,
        "WIDTH": 32,
        "WIDTH_V": 64,
        "ROWS": 64,
        "ROWS_TAIL": 64,
        "BLOCK": 32,
        "TAIL": 16,
        "STAGES": 3,
        "PTX": DEVICE == "cuda",
    }


def test_what_triton_compiles_apart_has_launchers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled kernel reads any memory as that which it was compiled for."""
    prepared: list[Any] = []

    def remember(key: Any) -> Any:
        prepared.append(key)
        return lambda tensors: None

    monkeypatch.setattr(area, "_prepare", lambda *key: remember(key))
    memory = torch.zeros(2 * 96 + 1, dtype=HALF, device=DEVICE)
    for qkv in (memory[:-1], memory[1:], memory[:-1].float()):
        area.launch("area_forward", qkv.view(1, 2, 1, 96), 32, (qkv,))
    assert [key[4] for key in prepared] == [((HALF, True),), ((HALF, False),), ((torch.float32, True),)]


def test_the_statistics_are_the_logarithms_of_the_sums() -> None:
    for qkv in (packed(2, 130, 2, 32, 32), hard_inputs()["middle"]):
        lse = torch.ops.yolo_flash.area_attention(qkv, 32)[2][..., :130]
        q, k, _ = qkv.double().split(32, dim=-1)
        scores = torch.einsum("gqhd,gkhd->ghqk", q, k) * 32**-0.5
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1) / math.log(2), atol=2e-3, rtol=1e-5)


def test_gradients_come_in_any_form() -> None:
    """Expanded, transposed, of one output only, of an input used twice; and none where none is wanted."""
    qkv = packed(2, 40, 2, 32, 32, dtype=PRECISE)

    def both(function: Any, reduce: Any) -> tuple[Tensor, Tensor]:
        leaf = qkv.clone().requires_grad_()
        reduce(*function(leaf, 32)).backward()
        assert leaf.grad is not None
        return leaf.grad, leaf

    twice = torch.randn(2, 32, 40, 2, device=DEVICE).permute(0, 2, 3, 1)
    reductions: list[Any] = [
        lambda out, image: out.sum(),
        lambda out, image: image.sum(),
        lambda out, image: (out * twice).sum() + (image * twice).sum(),
        lambda out, image: (out * image).sum() + out.pow(2).sum(),
    ]
    bound = 1e-5 if DEVICE == "cpu" else 1e-2
    for reduce in reductions:
        assert error(both(area_attention, reduce)[0], both(exact, reduce)[0].double()) < bound
    assert not area_attention(qkv, 32)[0].requires_grad
    leaf = qkv.clone().requires_grad_()
    out = area_attention(area_attention(leaf, 32)[0].repeat(1, 1, 1, 3), 32)[0]  # twice in one graph
    out.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_a_packed_tensor_of_other_strides_is_copied() -> None:
    wide = packed(2, 40, 2, 48, 32)
    view = wide[..., :96]
    assert not view.is_contiguous()
    torch.testing.assert_close(area_attention(view, 32)[0], area_attention(view.contiguous(), 32)[0])


def test_nothing_comes_from_nothing() -> None:
    for groups, tokens in ((0, 40), (2, 0)):
        qkv = torch.empty(groups, tokens, 2, 96, device=DEVICE, dtype=HALF, requires_grad=True)
        out, image = area_attention(qkv, 32)
        assert out.shape == image.shape == (groups, tokens, 2, 32)
        (out.sum() + image.sum()).backward()
        assert qkv.grad is not None
        assert qkv.grad.shape == qkv.shape


def test_is_a_well_formed_operator() -> None:
    qkv = packed(1, 32, 1, 32, 32, dtype=PRECISE).requires_grad_()  # 16 divides the tokens: no padding to compare
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.yolo_flash.area_attention.default, (qkv, 32), test_utils=tests)
    with torch.no_grad():
        out, image, lse = torch.ops.yolo_flash.area_attention(qkv, 32)
        backward = torch.ops.yolo_flash.area_attention_backward.default
        torch.library.opcheck(backward, (qkv, out, lse, out, image, 32), test_utils=tests[:2])


def test_compiles_without_a_break() -> None:
    first, second = torch.randn(2, 1, 20, 1, 32, device=DEVICE).to(PRECISE)

    def function(t: Tensor) -> Tensor:
        out, image = area_attention(t[..., 1:] * 2, 32)
        return out * first + image * second

    qkv = torch.randn(1, 20, 1, 97, device=DEVICE).to(PRECISE)
    leaf, eager = (qkv.clone().requires_grad_() for _ in range(2))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(leaf)
    torch.testing.assert_close(compiled, function(eager))
    compiled.sum().backward()
    function(eager).sum().backward()
    torch.testing.assert_close(leaf.grad, eager.grad)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_tiles_are_powers_of_two_that_fit_the_card(capability: tuple[int, int]) -> None:
    """Tiles in shared memory: those of the stages, one more outside of the loop, and the program's own rows."""
    kernels: tuple[area.Kernel, ...] = ("area_forward", "area_backward_q", "area_backward_kv")
    limit = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99) * 1024
    for kernel in kernels:
        for dim, dim_v in ((16, 16), (32, 32), (32, 64), (36, 72), (64, 64), (128, 128)):
            for tokens in (1, 400, 1600, 65536):
                tiles = area.tiles_for(kernel, tokens, dim, dim_v, capability)
                for size in (tiles.rows, tiles.block):
                    assert size >= 16
                    assert size & (size - 1) == 0
                width = sum(1 << (d - 1).bit_length() for d in (dim, dim_v))
                rows = tiles.block * (tiles.num_stages + 1) + tiles.rows
                assert rows * width * 2 <= limit, (kernel, dim, dim_v, tiles)


# Every tile -----------------------------------------------------------------------------------------------------------
KERNELS: tuple[area.Kernel, ...] = ("area_forward", "area_backward_q", "area_backward_kv")
HEADS = ((16, 16), (32, 32), (32, 64), (36, 72), (64, 64), (128, 128))  # dimensions of a key and of a value
Choice = tuple[tuple[int, int], dict[area.Kernel, area.Tiles]]


def every_tiles() -> list[Choice]:
    """Head dims with each distinct set of tiles that some card gets for them, at some number of tokens."""
    found: list[Choice] = []
    for dims in HEADS:
        for capability in CAPABILITIES:
            for tokens in (1, 49, 400, 1023, 1024, 1600, 2047, 2048, 4096, 8191, 8192, 65536):
                choice = dims, {kernel: area.tiles_for(kernel, tokens, *dims, capability) for kernel in KERNELS}
                if choice not in found:
                    found.append(choice)
    return found


def tiles_id(choice: Choice) -> str:
    """`32/64: 64x64w4s3 64x32w4s4 128x64w4s3`, with the registers where they are limited."""
    (dim, dim_v), tiles = choice
    sizes = (f"{t.rows}x{t.block}w{t.num_warps}s{t.num_stages}" for t in tiles.values())
    limits = (f"r{t.max_registers}" if t.max_registers else "" for t in tiles.values())
    return f"{dim}/{dim_v}: " + " ".join(map("".join, zip(sizes, limits, strict=True)))


def take_tiles(tiles: dict[area.Kernel, area.Tiles], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have all launches use these tiles, whatever the card; the kernels that were launched."""
    launched: list[str] = []
    launch = area.launch

    def with_tiles(kernel: area.Kernel, qkv: Tensor, head_dim: int, tensors: tuple[Tensor, ...]) -> None:
        launched.append(kernel)
        launch(kernel, qkv, head_dim, tensors, tiles[kernel])

    monkeypatch.setattr(area, "launch", with_tiles)
    return launched


@pytest.mark.parametrize("choice", every_tiles(), ids=tiles_id)
def test_every_tiles_give_the_outputs_and_gradients_of_float64(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles of each size and a rest of 5, no rest, no whole tile; warps and registers are for tests/gpu."""
    dims, tiles = choice
    launched = take_tiles(tiles, monkeypatch)
    if PRECISE is torch.float32:
        for tokens in (133, 128, 13):
            check(packed(1, tokens, 1, *dims, dtype=PRECISE), dims[0], 1e-6)
    check(packed(1, 133, 1, *dims), dims[0], 1e-3)
    assert set(launched) == set(KERNELS)


def test_blackwell_gets_no_tiles_of_hopper() -> None:
    """Its consumer cards have 99 KiB of shared memory, and nobody has measured the others."""
    for kernel in KERNELS:
        for tokens in (400, 1600, 8192):
            for dims in HEADS:
                ampere = area.tiles_for(kernel, tokens, *dims, (8, 0))
                for capability in ((10, 0), (10, 3), (11, 0), (12, 0), (12, 1)):
                    assert area.tiles_for(kernel, tokens, *dims, capability) == ampere
    assert area.tiles_for("area_forward", 400, 32, 32, (9, 0)) != area.tiles_for("area_forward", 400, 32, 32, (8, 0))
