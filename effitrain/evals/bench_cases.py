"""What a training step computes, and by which ways: the cases of the kernel benchmark, at the shapes of a model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effitrain.evals import peers
from effitrain.evals.kernels import Maker
from effitrain.evals.peers import UNSLOTH
from effitrain.kernels import (
    linear_cross_entropy,
    lora_linear,
    lora_mlp,
    lora_qkv,
    nf4_dequantize,
    nf4_linear,
    rms_norm,
    rope,
    swiglu,
)
from effitrain.kernels.lora_linear import Linear

Ways = dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model's layer, and what passes through it."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tokens: int
    rank: int


LLAMA_8B = Shapes("8B", 4096, 14336, 32, 8, 128, 128256, 4096, 16)
LLAMA_70B = Shapes("70B", 8192, 28672, 64, 8, 128, 128256, 4096, 16)


@dataclass(frozen=True)
class Case:
    """One thing to compute, by several ways: ``make()`` gives fresh inputs, and every contender takes them.

    Any way must move ``moved`` bytes and make ``flops`` multiplications and additions.
    """

    kernel: str
    shape: str
    make: Callable[[], Sequence[Any]]
    contenders: Ways
    moved: float = 0
    flops: float = 0


def cases(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """What a training step of ``shapes`` computes."""
    make = Maker(device, dtype, torch.Generator().manual_seed(0))
    yield from _nf4_cases(make, shapes)
    yield from _lora_cases(make, shapes)
    yield from _pointwise_cases(make, shapes)
    yield _loss_case(make, shapes)


def _nf4_cases(make: Maker, s: Shapes) -> Iterator[Case]:
    weight: Any = make.linear(s.ffn, s.hidden).base.weight  # type: ignore[attr-defined]
    stock = partial(peers.stock_values, dtype=make.dtype)
    ways: Ways = {"ours": partial(nf4_dequantize.nf4_dequantize, dtype=make.dtype), "bitsandbytes": stock}
    if peers.installed("unsloth"):
        parameter: Any = peers.stock_linear(weight, make.dtype).weight
        ways[UNSLOTH] = lambda _: peers.unsloth_values(parameter)
    size, width = f"{s.ffn}x{s.hidden}", make.dtype.itemsize
    yield Case("nf4_dequantize", size, lambda: [weight], ways, weight.nbytes + s.ffn * s.hidden * width)
    products = {"ours": nf4_linear.product, "bitsandbytes": lambda x, w: F.linear(x, stock(w))}
    for tokens in sorted({1, 16, 64, 256, s.tokens}):
        inputs = partial(_inputs, make, (tokens, s.hidden), weight)
        moved = weight.nbytes + tokens * (s.hidden + s.ffn) * width
        yield Case(
            "nf4_linear", f"{tokens} tokens, {size}", inputs, products, moved, 2 * tokens * s.hidden * s.ffn
        )  # fmt: skip


def _lora_cases(make: Maker, s: Shapes) -> Iterator[Case]:
    inputs, size = partial(_inputs, make, (s.tokens, s.hidden)), f"{s.tokens} tokens, rank {s.rank}"
    gate, up = (make.linear(s.ffn, s.hidden, s.rank) for _ in range(2))
    down = make.linear(s.hidden, s.ffn, s.rank)

    def case(name: str, what: str, linears: dict[str, Linear]) -> Case:
        values = linears.values()
        ways = _lora_ways(name, linears, make)
        return Case(name, f"nf4, {size}, {what}", partial(inputs, *values), ways, 0, _flops(s, *values))

    yield case("lora_linear", f"{s.ffn}x{s.hidden}", {"o_proj": gate})
    plain = Linear(_Plain(gate.base.dense(make.dtype)), gate.low_rank)
    ways: Ways = {"ours": _step(lora_linear.lora_linear), "eager": _step(lora_linear.reference)}
    ways["the two products alone"] = _products(plain.base)
    yield Case(
        "lora_linear", f"plain, {size}, {s.ffn}x{s.hidden}", partial(inputs, plain), ways, 0, _flops(s, plain)
    )  # fmt: skip
    widths = {"q_proj": s.heads * s.head_dim, "k_proj": s.kv_heads * s.head_dim, "v_proj": s.kv_heads * s.head_dim}
    attention = {name: make.linear(width, s.hidden, s.rank) for name, width in widths.items()}
    yield case("lora_qkv", f"hidden {s.hidden}", attention)
    mlp = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    yield case("lora_mlp", f"hidden {s.hidden}, ffn {s.ffn}", mlp)


def _lora_ways(name: str, linears: dict[str, Linear], make: Maker) -> Ways:
    """Forward and backward through a block with updates: ours, in plain torch, by peft and by Unsloth."""
    room: Any = {"lora_linear": lora_linear, "lora_qkv": lora_qkv, "lora_mlp": lora_mlp}[name]
    ways = {"ours": _step(getattr(room, name)), "eager": _step(room.reference)}
    if not peers.installed("peft"):
        return ways
    module = peers.adapted(linears, make.dtype)
    trained = [p for p in module.parameters() if p.requires_grad]
    ways["peft"] = _step(peers.autocast(peers.peft_block(name, module), make.device, make.dtype), trained)
    if peers.installed("unsloth"):
        ways[UNSLOTH] = _step(peers.unsloth_block(name, module), trained)
    return ways


def _flops(s: Shapes, *linears: Linear) -> float:
    """Of forward and backward: two products with each weight, six with its factors."""
    updates = [linear.low_rank for linear in linears if linear.low_rank is not None]
    sizes = [(len(update.B), update.A.shape[1]) for update in updates]
    return sum(s.tokens * (4 * out * inp + 6 * s.rank * (out + inp)) for out, inp in sizes)


def _products(base: Any) -> Callable[..., Tensor]:
    """The least that any way must compute: y, and dx from a gradient of its shape."""

    @torch.no_grad()
    def call(x: Tensor, _: Linear) -> Tensor:
        return F.linear(x, base.weight) @ base.weight

    return call


def _pointwise_cases(make: Maker, s: Shapes) -> Iterator[Case]:
    rows, size = s.tokens, make.dtype.itemsize
    inputs = partial(_inputs, make, (rows, s.hidden), make.randn(s.hidden), 1e-5)
    ways = _ways(rms_norm.rms_norm, rms_norm.reference, peers.liger("rms_norm"), _step(peers.unsloth_norm))
    yield Case("rms_norm", f"{rows}x{s.hidden}", inputs, ways, 5 * rows * s.hidden * size)

    def heads() -> list[Tensor]:
        return [make.randn(1, rows, count, s.head_dim, trained=True) for count in (s.heads, s.kv_heads)] + tables

    tables = [make.randn(1, rows, s.head_dim // 2).repeat(1, 1, 2) for _ in range(2)]
    ways = _ways(_both(rope.rope), _both(rope.reference), peers.liger("rope") and peers.liger_rope,
                 _step(peers.unsloth_rope))  # fmt: skip
    what = f"{rows}x({s.heads} + {s.kv_heads})x{s.head_dim}"
    yield Case("rope", what, heads, ways, 4 * rows * (s.heads + s.kv_heads) * s.head_dim * size)

    def pair() -> list[Tensor]:
        return [make.randn(rows, s.ffn, trained=True) for _ in range(2)]

    ways = _ways(swiglu.swiglu, swiglu.reference, peers.liger("swiglu"), peers.unsloth_swiglu)
    yield Case("swiglu", f"{rows}x{s.ffn}", pair, ways, 8 * rows * s.ffn * size)


def _both(turn: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``turn`` of queries and of keys."""
    return lambda query, key, cos, sin: (turn(query, cos, sin), turn(key, cos, sin))


def _loss_case(make: Maker, s: Shapes) -> Case:
    head, labels = make.randn(s.vocab, s.hidden), torch.arange(s.tokens, device=make.device) % s.vocab
    fused, whole = linear_cross_entropy.linear_cross_entropy, linear_cross_entropy.reference
    ways: dict[str, Any] = {
        "ours": _step(lambda h: fused(h, lambda rows: F.linear(rows, head), labels)),
        "eager": _step(lambda h: whole(h, lambda rows: F.linear(rows, head), labels)),
    }
    liger = peers.liger("fused_linear_cross_entropy")
    if liger is not None:
        ways["liger-kernel"] = _step(lambda h: liger(h, head, labels))
    if peers.installed("unsloth"):
        loss = peers.unsloth("fast_cross_entropy_loss")
        ways[UNSLOTH] = _step(lambda h: loss(F.linear(h, head)[None], labels[None]))
    inputs, flops = partial(_inputs, make, (s.tokens, s.hidden)), 4 * s.tokens * s.vocab * s.hidden
    return Case("linear_cross_entropy", f"{s.tokens} tokens, {s.vocab}x{s.hidden}", inputs, ways, 0, flops)


@dataclass
class _Plain:
    """A frozen linear whose weight is plain."""

    weight: Tensor
    bias: Tensor | None = None
    value_needed: bool = True

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def transposed_product(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        return grad @ self.weight if into is None else into.addmm_(grad, self.weight)


def _inputs(make: Maker, shape: tuple[int, ...], *others: Any) -> list[Any]:
    """A trained input of ``shape`` and the other arguments."""
    return [make.randn(*shape, trained=True), *others]


def _ways(
    ours: Callable[..., Any], reference: Callable[..., Any], liger: Callable[..., Any] | None, unsloth: Any
) -> Ways:
    """Forward and backward by our kernel, by the reference, the same compiled, and by others where they are."""
    ways = {"ours": _step(ours), "eager": _step(reference), "torch.compile": _step(torch.compile(reference))}
    if liger is not None:
        ways["liger-kernel"] = _step(liger)
    return ways | ({UNSLOTH: unsloth} if peers.installed("unsloth") else {})


def _step(function: Callable[..., Any], parameters: Iterable[nn.Parameter] | None = None) -> Callable[..., None]:
    """Forward and backward of ``function``, to all that is trained: of its inputs, or among them the first alone and
    ``parameters``.
    """

    def call(*inputs: Any) -> None:
        given = inputs if parameters is None else inputs[:1]
        out = function(*given)
        outputs = out if isinstance(out, tuple) else (out,)
        linears = [t for i in given if isinstance(i, Linear) for t in i.tensors if t is not None]
        trained = [t for t in (*given, *linears, *(parameters or ())) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.grad(outputs, trained, [torch.ones_like(y) for y in outputs])

    return call
