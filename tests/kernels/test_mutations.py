"""Deliberate faults in the kernels, one at a time in a copy of the package: the interpreter tests must catch each.

Slow, as each is a run of pytest: pytest -n 2 -m slow tests/kernels/test_mutations.py. The last run caught all of them.
One is no fault, and must pass: so a run that fails for another reason is not taken for a catch.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Kernel and kind of fault; what stands in its file; what takes its place.
MUTATIONS = """
nf4_dequantize: wrong block
- tl.load(nested_ptr + block // 256,
+ tl.load(nested_ptr + block // 255,
nf4_dequantize: missing offset
- * nested + tl.load(offset_ptr)
+ * nested
nf4_dequantize: halves swapped
- nf4_value(byte >> 4) * scale, nf4_value(byte & 15)
+ nf4_value(byte & 15) * scale, nf4_value(byte >> 4)
nf4_dequantize: missed last byte
- mask=at < size
+ mask=at < size - 1
nf4_dequantize: store beyond the end
- mask=out < count)
+ mask=out < count + 64)
nf4_dequantize: none: the same float32
- tl.where(b0, 1.0, 0.7229568362236023)
+ tl.where(b0, 1.0, 0.7229568362236)
nf4_dequantize: wrong constant
- -0.5250730514526367
+ -0.5250731514526367
nf4_linear: missed tail of K
- for start in range(0, K, BK):
+ for start in range(0, K - BK + 1, BK):
nf4_linear: read beyond the end of a row
- mask=k[None, :] < K - start
+ mask=k[None, :] < K
nf4_linear: wrong column
- + column // 64 + tl.arange
+ + tl.arange
nf4_linear: the other way round
- (width // 64) + column
+ (width // 64 + 1) + column
nf4_linear: buffer overwritten
- if ADD:
+ if False:
nf4_linear: bias left out
- if BIAS:
+ if False:
nf4_linear: groups beyond the end
- rows = min(tl.cdiv(M, BM) - group * GROUP, GROUP)
+ rows = GROUP
lora_linear: scale left out
- total += scale * multiply(z, b
+ total += multiply(z, b
lora_linear: missed tail of K
- for start in range(0, K, BK):
+ for start in range(0, K - BK + 1, BK):
lora_linear: gradient without scale
- (grad @ update.B.to(grad.dtype)).mul_(update.scale)
+ (grad @ update.B.to(grad.dtype))
lora_linear: transposed gradient of mid
- (dz.t() @ low)
+ (low.t() @ dz)
lora_linear: backward without dropout
- return dropout(dlow @ down, update.dropout, update.seed, into=total)
+ return total.add_(dlow @ down)
lora_linear: buffer overwritten
- total += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
+ total += 0.0
lora_linear: input kept where A is frozen
- flat if any(ctx.needs_input_grad[2::3]) else None
+ flat
lora_qkv: keys for values
- lora_linears(x, (query, key, value))
+ lora_linears(x, (query, key, key))
lora_mlp: a share of dh missing
- h = dh = input_gradient(grad, dlow, ctx.linears[2])
+ h = dh = input_gradient(grad, None, ctx.linears[2])
lora_mlp: gradient of one branch lost
- dx = input_gradient(dwide, dlow, linear, dx)
+ dx = input_gradient(dwide, dlow, linear)
lora_mlp: silent second backward
- torch.autograd.graph.increment_version(changed)
+ pass
rms_norm: weight forgotten in dx
- normed * (tl.sum(wg * normed, 1) / H)[:, None]
+ normed * (tl.sum(g * normed, 1) / H)[:, None]
rms_norm: mean over the tile
- / H + eps)
+ / COLS + eps)
rms_norm: first rows of a share only
- part * share + start + tl.arange(0, ROWS)
+ part * share + tl.arange(0, ROWS)
rope: sign
- (b * cos + a * sin)
+ (b * cos - a * sin)
rope: one angle for all
- token % positions
+ token % 1
rope: backward turns the same way
- cos, sin, ctx.interleaved, -1)
+ cos, sin, ctx.interleaved, 1)
swiglu: sign in the derivative
- g * s * (1.0 - s) * slope
+ g * s * (1.0 + s) * slope
swiglu: slope of gelu
- 0.134145
+ 0.044715
dropout: not rescaled
- >= p, x / (1.0 - p)
+ >= p, x
dropout: buffer overwritten
- if ADD:
+ if False:
linear_cross_entropy: sum not rescaled
- norm = norm * tl.exp(top - above)
+ norm = norm
linear_cross_entropy: maximum left out
- tl.log(norm) + top - picked
+ tl.log(norm) - picked
shifted_attention: nothing shifted
- first = group // 2 if shifted and length > group else group
+ first = group
"""
CASES = re.findall(r"^(\w+): (.+)\n- (.+)\n\+ (.+)$", MUTATIONS, re.M)


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(("kernel", "kind", "found", "fault"), CASES, ids=[f"{case[0]}: {case[1]}" for case in CASES])
def test_is_caught(tmp_path, kernel, kind, found, fault):
    ignore = shutil.ignore_patterns("__pycache__", "presets")
    shutil.copytree(ROOT / "effitrain", tmp_path / "effitrain", symlinks=True, ignore=ignore)
    shutil.copytree(ROOT / "effitrain/presets", tmp_path / "effitrain/presets")
    for folder in ("kernels", "pruning", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "kernels" / f"{kernel}.py"
    text = path.read_text()
    assert found in text, "the source has moved on: the fault must follow it"
    path.write_text(text.replace(found, fault, 1))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    options = ["-q", "-x", "-m", "not slow and not gpu", "-p", "no:cacheprovider", f"tests/kernels/test_{kernel}.py"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    caught = done.returncode == 1 and ("FAILED" in done.stdout or "ERROR" in done.stdout)
    assert caught is not kind.startswith("none"), done.stdout[-2000:]
