"""Every kernel at every shipped tile, compiled for five architectures without a card: no spills, shared memory within
the card's, tensor cores where they belong, and registers and shared memory as in the committed table.

    python -P tests/aot/test_compile.py     # writes resources.json anew, after a change that is meant
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effitrain.kernels import (
    backend,
    dropout,
    linear_cross_entropy,
    lora_linear,
    nf4_dequantize,
    nf4_linear,
    rms_norm,
    rope,
    swiglu,
)
from effitrain.kernels.tiles import Tile, Tiles, all_tiles

TABLE = Path(__file__).with_name("resources.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Shared memory of a program in KiB: CUDA programming guide, compute capabilities.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
NF4, NO_FUSION = "*u8 *u8 *fp32 *fp32 *fp32", {"enable_fp_fusion": False}
# What the tuner may choose for thousands of tokens: the largest tile that spills on no card.
MANY = {"default": ((4096, Tile(128, 128, 64, 8, 3)),)}


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched: the types of its arguments in order, its constants and its options."""

    name: str
    kernel: Any
    types: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    tensor_cores: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def cases(half: str = "bf16") -> Iterator[Case]:
    """What the engine launches for models in ``half`` precision."""
    for table, tiles in all_tiles().items():
        types, constants = f"{NF4} *{half} i32 i32", {"BLOCKS": tiles.dequantize_blocks}
        yield Case(f"nf4_dequantize {table}", nf4_dequantize._nf4_dequantize, types, constants, options=NO_FUSION)
        if half != "fp32":  # where our own products are not launched: it has no tensor cores
            yield from products(half, table, tiles)
    for hidden in (128, 4096, 8192):
        cols, rows = hidden, max(1, rms_norm.TILE // hidden)
        tile, warps = {"ROWS": rows, "COLS": cols}, min(max(rows * cols // 1024, 4), 16)
        yield Case(f"rms_norm {hidden}", rms_norm._forward, f"*{half} *{half} *{half} *fp32 i32 i32 fp32", tile, warps)
        types = f"*{half} *{half} *{half} *fp32 *{half} *fp32 i32 i32 i32"
        for trained in (False, True):
            name = f"rms_norm backward {hidden}{' trained' if trained else ''}"
            yield Case(name, rms_norm._backward, types, {"WEIGHT": trained, **tile}, warps)
    for dim in (64, 128):
        for sign, interleaved in ((1, False), (-1, True)):
            constants = {"SIGN": sign, "INTERLEAVED": interleaved, "HEADS": rope.HEADS, "HALF": dim // 2}
            yield Case(f"rope {dim} {sign}", rope._rope, f"{' '.join([f'*{half}'] * 4)} i32 i32 i32", constants)
    softmax, constants = linear_cross_entropy._softmax, {"COLS": linear_cross_entropy.COLUMNS}
    yield Case("linear_cross_entropy", softmax, f"*{half} *i64 *fp32 i32", constants, warps=8)
    types = f"*{half} *{half} i32 fp32 i32"
    yield Case("dropout", dropout._dropout, types, {"ADD": True, "ELEMENTS": dropout.ELEMENTS})
    for gelu in (False, True):
        name, constants = "geglu" if gelu else "swiglu", {"GELU": gelu, "ELEMENTS": swiglu.ELEMENTS}
        yield Case(name, swiglu._forward, f"{' '.join([f'*{half}'] * 3)} i32", constants)
        types = f"{' '.join([f'*{half}'] * 6)} i32"
        yield Case(f"{name} backward", swiglu._backward, types, {"OUT": True, **constants})


def products(half: str, table: str, tiles: Tiles) -> Iterator[Case]:
    """Our own products, both ways."""
    wide = {"WIDE": False, "GROUP": nf4_linear.GROUP}
    for most, tile in (*tiles.nf4, *MANY.get(table, ())):
        types, options = f"*{half} {NF4} *{half} *{half} i32 i32 i32 i32", (tile.warps, tile.stages, True, NO_FUSION)
        for transposed in (False, True):
            blocks = {"BM": tile.m, "BN": max(tile.n, 64) if transposed else tile.n, "BK": tile.k}
            flags = {"TRANSPOSED": transposed, "BIAS": not transposed, "ADD": transposed, **wide}
            name = f"nf4_linear{' transposed' * transposed} {most} {table}"
            yield Case(name, nf4_linear._nf4_linear, types, {**flags, **blocks}, *options)
    tile, types = tiles.lora, f"{f'*{half} ' * 6} {'i32 ' * 6} fp32"
    blocks = {"BM": tile.m, "BN": tile.n, "BK": tile.k, **wide}
    for rank in (16, 128):
        for backward in (False, True):
            # A weight is read along its rows forward and down its columns backward: the strides of 1 are constants.
            ones = {"w_n": 1, "b_n": 1} if backward else {"w_k": 1, "b_r": 1}
            constants = {"BR": rank, "ADD": backward, "BIAS": not backward, **blocks, **ones}
            name = f"lora_linear{' backward' * backward} {rank} {table}"
            yield Case(name, lora_linear._lora_linear, types, constants, tile.warps, tile.stages, True)


CASES = list(cases())


def compiled(
    case: Case, architecture: int, odd: frozenset[str] = frozenset(), ones: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Registers a thread, bytes of stack, local and shared memory, loads of single bytes, whether tensor cores compute.

    Args:
        case: what to compile.
        architecture: compute capability, such as 89.
        odd: names of arguments that are no multiples of 16; the launcher specialises for those that are.
        ones: names of integers that are 1, which the launcher makes constants.
    """
    names, types = case.kernel.arg_names, iter(case.types.split())
    signature = {name: "constexpr" if name in case.constants else next(types) for name in names}
    assert next(types, None) is None, "more types than arguments"
    ones &= {name for name, kind in signature.items() if kind == "i32"}
    signature.update(dict.fromkeys(ones, "constexpr"))
    even = [i for i, name in enumerate(names) if signature[name][0] in "*i" and name not in odd]
    aligned = {(i,): [["tt.divisibility", 16]] for i in even}
    constants = {**case.constants, **dict.fromkeys(ones, 1)}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages, **case.options}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        said = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said.stdout + said.stderr)
    assert usage is not None, said.stdout
    registers, stack, local = map(int, usage.groups())
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": built.metadata.shared,
        "single bytes": len(re.findall(r"ld\.global\S*\.[bu]8", built.asm["ptx"])),
        "tensor cores": bool(re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", built.asm["ptx"])),
    }


@pytest.mark.parametrize("architecture", SHARED_KIB)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_within_the_card(case, architecture):
    found = compiled(case, architecture)
    assert found["spilled"] == 0 and found["registers"] <= 255
    assert found["shared"] <= SHARED_KIB[architecture] * 1024
    assert found["tensor cores"] is case.tensor_cores
    table = json.loads(TABLE.read_text())
    if table["triton"] == triton.__version__:
        assert table[f"sm_{architecture}"][case.name] == [found["registers"], found["shared"]]


def test_codes_are_read_many_at_once():
    """A mask that the compiler cannot see through makes a thread read byte by byte; only scales are single bytes."""
    for case in CASES:
        if case.name.startswith("nf4"):
            assert compiled(case, 89)["single bytes"] <= 4, case.name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_KIB)
@pytest.mark.parametrize("case", [*cases("fp16"), *cases("fp32")], ids=lambda case: f"{case.types} {case.name}")
def test_compiles_in_other_precisions(case, architecture):
    found = compiled(case, architecture)
    assert found["spilled"] == 0 and found["shared"] <= SHARED_KIB[architecture] * 1024


# What the launcher makes of one token, one row, one head, a first seed, and of widths that pruning left odd.
ONES = frozenset({"M", "rows", "count", "heads", "positions", "share", "seed"})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_as_it_is_specialised(case):
    ours = case.kernel in (
        lora_linear._lora_linear,
        nf4_linear._nf4_linear,
    )  # not used for odd widths, but for any rank
    odd = frozenset({"M", "R"} if ours else case.kernel.arg_names)
    assert compiled(case, 89, odd)["spilled"] == 0
    assert compiled(case, 89, ones=ONES)["spilled"] == 0


def test_the_table_has_every_case_and_no_other():
    table = json.loads(TABLE.read_text())
    assert len({case.name for case in CASES}) == len(CASES)
    for architecture in SHARED_KIB:
        assert list(table[f"sm_{architecture}"]) == [case.name for case in CASES]


def test_every_kernel_file_has_a_case():
    covered = {case.kernel.fn.__module__ for case in CASES}
    kernels = {p.stem for p in Path(backend.__file__).parent.glob("*.py") if "@triton.jit" in p.read_text()}
    assert {name.rpartition(".")[2] for name in covered} == kernels


if __name__ == "__main__":
    lines: dict[str, Any] = {"triton": triton.__version__}
    for architecture in SHARED_KIB:
        results = {case.name: compiled(case, architecture) for case in CASES}
        lines[f"sm_{architecture}"] = {name: [r["registers"], r["shared"]] for name, r in results.items()}
        print(architecture, {name: r for name, r in results.items() if r["spilled"] or r["registers"] > 128})
    TABLE.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(lines, indent=1)) + "\n")
