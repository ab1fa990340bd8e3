"""Memory and time of a step: LISA in its forms against LoRA and full tuning, in one run.

    OMP_NUM_THREADS=1 python scripts/bench_lisa.py --out benchmarks/lisa.json

The model is a random Llama of about 125M parameters in float32 that is never written anywhere, the data random tokens,
all trained, 4 x 512 a step; rank 16 on all linears, two layers at a time. Step memory is the peak of tracked tensor
storages in a whole step and in an evaluation, weights and optimizer states included, with the layers trained that take
most; beside it stands what the plan says. Sides take turns, and seconds are medians: where others use the machine too,
read ratios, and those of CPU seconds.
"""

import os
import statistics
import time
from typing import Any

import numpy as np
import torch
from study import measured

from effitrain.core.budget import MemoryBudget
from effitrain.core.plan import make_plan, resolve
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import spec_from_config
from effitrain.data.tokenized import TokenSet
from effitrain.io.hub import ModelSource
from effitrain.model.load import Base
from effitrain.train.job import Job, assemble, make_batches
from effitrain.train.loop import accumulate
from effitrain.train.memory import Meter
from effitrain.train.probe import probe

CPU = torch.device("cpu")
SHAPE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8}
SIDES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "lisa": {"method": "lisa", "lisa_train_embeddings": False},
    "lisa, embeddings too": {"method": "lisa", "lisa_train_embeddings": True},
    "lisa-lora": {"method": "lisa-lora"},
    "lisa-delta, rank 64": {"method": "lisa-delta", "lora_r": 64},
    "full": {"method": "full"},
}


class Side:
    """A job on the model, its measured memory, and the seconds of its steps."""

    def __init__(self, config: dict[str, Any], rows: int, length: int, recompute: str, fields: dict[str, Any]):
        base = Base(ModelSource("bench", None, config, None), spec_from_config(config, "bench"), 0)
        sizes = {"batch_size": rows, "max_seq_len": length, "grad_accum": 1, "optimizer": "adamw", "max_steps": 1000}
        form = {"quant": "none", "dtype": "fp32", "weights": "synthetic", "fit": "resident", "recompute": recompute}
        asked = make_recipe({**sizes, **form, "offload_activations": "off", **fields})
        plan = make_plan(base.spec, asked, MemoryBudget(2**50, 2**50, 0, "cpu"))
        ids = np.random.default_rng(0).integers(0, base.spec.vocab, 16 * rows * length).astype(np.int32)
        tokens = TokenSet(ids, ids.copy(), np.arange(0, len(ids) + 1, length))
        full = resolve(asked, plan)
        self.job: Job = assemble(full, base, make_batches(tokens, full), CPU)
        meter = Meter(CPU)
        probe(self.job.decoder, [self.job.batches.get(0)], self.job.optimizer, self.job.clock, meter)
        self.planned, self.measured = plan.peak_bytes, meter.peak()
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        if self.job.lisa:
            self.job.lisa.begin(0)

    def step(self, number: int) -> None:
        """One step, timed."""
        job = self.job
        started, cpu = time.perf_counter(), time.process_time()
        accumulate(job.decoder, [job.batches.get(number)], job.clock, job.optimizer.param_groups[0]["params"])
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = measured.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a side; one more warms up")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row; 4 rows a step")
    parser.add_argument("--small", action="store_true", help="a third of the widths, an eighth of the vocabulary")
    parser.add_argument("--recompute", choices=["none", "mlp", "layer"], default="none")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    machine = measured.machine()
    config = {**SHAPE, **(SMALL if asked.small else {}), "num_hidden_layers": asked.layers}
    sides = {name: Side(config, 4, asked.tokens, asked.recompute, fields) for name, fields in SIDES.items()}
    for number in range(asked.steps + 1):
        for side in sides.values():
            side.step(number)
    lora = sides["lora"]
    report = {
        "command": f"bench_lisa.py --steps {asked.steps} --layers {asked.layers} --tokens {asked.tokens}"
        f" --recompute {asked.recompute}",
        "machine": machine,
        "sides": {
            name: {
                "step_peak_bytes": side.measured,
                "planned_bytes": side.planned,
                "seconds": statistics.median(side.seconds[1:]),
                "cpu_seconds": statistics.median(side.cpu_seconds[1:]),
                "memory_of_lora": side.measured / lora.measured,
                "cpu_seconds_of_lora": statistics.median(side.cpu_seconds[1:])
                / statistics.median(lora.cpu_seconds[1:]),
            }
            for name, side in sides.items()
        },
    }
    measured.write(report, asked.out)


if __name__ == "__main__":
    main()
