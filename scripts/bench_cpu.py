"""The same LoRA job in effitrain and in transformers' Trainer + peft: speed, memory of a step, loss curve.

    OMP_NUM_THREADS=1 python scripts/bench_cpu.py --out benchmarks/cpu.json

Without OMP_NUM_THREADS torch takes all cores. Where others use the machine too, take one thread and read the speeds by
CPU second: they count the time this process computed and not the time it waited for a core.

The model is a random Llama of about 125M parameters in float32, the data random tokens with the first half of every
sample masked, the adapter rank 16 on all linears. Weights, adapter start, data, order, optimizer and rates are the same
on all sides. Each side runs in a process of its own, the sides take turns, and medians over the repeats are reported.
Two later steps are not timed. One is profiled: time in matrix products and in attention, where all sides call the same
functions, and the rest; ``at_most`` is how much faster than the peer a side would be if its rest took no time. During
the other, the peak of tracked tensor storages is taken by one tracker, weights and optimizer states included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

from study import measured

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LENGTH, BATCH, RANK, ALPHA, LR = 512, 4, 16, 32, 1e-3
SIDES = ("trainer_peft", "effitrain", "effitrain_recompute")
SPEEDS = ("tokens_per_second", "tokens_per_cpu_second")
PRODUCTS = {f"aten::{name}" for name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")}
UNTIMED = 2  # steps at the beginning of a run; the last two are profiled and tracked


def main() -> None:
    """Parse the command line; a side measures itself, otherwise all are compared."""
    parser = measured.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="steps of a run, of which four are not timed")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= UNTIMED + 2:
        parser.error(f"--steps {args.steps} leaves none to time: {UNTIMED + 3} at least.")
    if args.side:
        run = _trainer_peft if args.side == "trainer_peft" else _effitrain
        print(json.dumps(run(args.work, args.steps, recompute=args.side.endswith("recompute"))))
        return
    with tempfile.TemporaryDirectory() as work:
        report = _compare(Path(work), args)
    measured.write(report, args.out)


def _compare(work: Path, args: argparse.Namespace) -> dict:
    machine = {**measured.machine(), "peft": version("peft")}
    _prepare(work, args.layers)
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--work", str(work), "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr}")
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"repeat {repeat + 1}: {side} {runs[side][-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    sides = {
        side: {
            **{speed: statistics.median(r[speed] for r in found) for speed in SPEEDS},
            **{f"{speed}_of_repeats": [round(r[speed], 1) for r in found] for speed in SPEEDS},
            "seconds_in": {
                part: statistics.median(r["seconds_in"][part] for r in found) for part in found[0]["seconds_in"]
            },
            "step_peak_bytes": found[0]["step_peak_bytes"],
            "losses": found[0]["losses"],
        }
        for side, found in runs.items()
    }
    ratios = {side: _ratios(runs[side], runs["trainer_peft"], sides[side], sides["trainer_peft"]) for side in SIDES[1:]}
    command = f"scripts/bench_cpu.py --repeats {args.repeats} --steps {args.steps} --layers {args.layers}"
    return {"command": command, "machine": machine, "ratios": ratios, "sides": sides}


def _ratios(runs: list[dict], peer_runs: list[dict], side: dict, peer: dict) -> dict:
    """Of a side to its peer. Turns make pairs that met the same load, so the ratio of each turn is taken first."""
    pairs = list(zip(runs, peer_runs, strict=True))
    spent = side["seconds_in"]
    return {
        **{speed: statistics.median(ours[speed] / theirs[speed] for ours, theirs in pairs) for speed in SPEEDS},
        "at_most": sum(peer["seconds_in"].values()) / (spent["products"] + spent["attention"]),
        "memory": side["step_peak_bytes"] / peer["step_peak_bytes"],
        "largest_relative_loss_difference": max(
            abs(a - b) / b for a, b in zip(side["losses"], peer["losses"], strict=True)
        ),
    }


def _prepare(work: Path, layers: int) -> None:
    """The model folder and the adapter that every side starts from."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from effitrain.adapters.attach import attach
    from effitrain.adapters.base import AdapterConfig, Clock
    from effitrain.adapters.storage import save_adapter

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})).save_pretrained(
        work / "model"
    )
    config = AdapterConfig(r=RANK, alpha=ALPHA)
    modules = attach(_decoder(work), config, Clock())
    save_adapter(work / "start", {path: m.factors() for path, m in modules.items()}, config, "model")


def _samples(steps: int):
    """Token ids and labels [steps * batch, length]."""
    import torch

    ids = torch.randint(SHAPE["vocab_size"], (steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    return ids, labels


def _decoder(work: Path):
    import torch

    from effitrain.model.load import find_base, load_model
    from effitrain.planning import recipe

    folder = str(work / "model")
    return load_model(find_base(folder), recipe(model=folder, quant="none", dtype="fp32"), torch.device("cpu"))


class Stopwatch:
    """Times of single steps; where the time of the last but one goes, and the tracked peak of the last."""

    def __init__(self, model, optimizer, steps: int):
        self.model, self.optimizer, self.steps = model, optimizer, steps
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.watcher = nullcontext()
        self.seconds_in: dict[str, float] = {}
        self.peak = 0

    def begin(self, step: int) -> None:
        """Step ``step`` (from 0) begins."""
        self.watcher = {self.steps - 2: self._profiled, self.steps - 1: self._tracked}.get(step, nullcontext)()
        self.watcher.__enter__()
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """The step has ended."""
        self.seconds.append(time.perf_counter() - self.started)
        self.cpu_seconds.append(time.process_time() - self.cpu_started)
        self.watcher.__exit__(None, None, None)

    @contextmanager
    def _profiled(self):
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            yield
        spent = dict.fromkeys(("products", "attention", "rest"), 0.0)
        for event in profiler.key_averages():
            part = "products" if event.key in PRODUCTS else "attention" if "scaled_dot" in event.key else "rest"
            spent[part] += event.self_cpu_time_total / 1e6
        self.seconds_in = spent

    @contextmanager
    def _tracked(self):
        from effitrain.train.memory import StorageTracker, model_tensors, optimizer_tensors

        tracker = StorageTracker()
        tracker.add([*model_tensors(self.model), *optimizer_tensors(self.optimizer)])
        with tracker:
            yield
        self.peak = tracker.peak

    def result(self, losses: list[float]) -> dict:
        """What a side reports."""
        timed = slice(UNTIMED, -2)
        return {
            "tokens_per_second": BATCH * LENGTH / statistics.median(self.seconds[timed]),
            "tokens_per_cpu_second": BATCH * LENGTH / statistics.median(self.cpu_seconds[timed]),
            "seconds_in": self.seconds_in,
            "step_peak_bytes": self.peak,
            "losses": [round(loss, 6) for loss in losses],
        }


def _effitrain(work: Path, steps: int, recompute: bool) -> dict:
    import torch

    from effitrain.adapters.attach import attach
    from effitrain.adapters.base import Clock
    from effitrain.adapters.storage import load_into, read_adapter
    from effitrain.data.batches import MicroBatch
    from effitrain.train.hooks import Hook
    from effitrain.train.loop import Course, train
    from effitrain.train.optim import make_optimizer
    from effitrain.train.state import TrainState

    decoder, bundle, clock = _decoder(work), read_adapter(work / "start"), Clock()
    decoder.set_recompute("layer" if recompute else "none")
    load_into(attach(decoder, bundle.config, clock), bundle, "start")
    optimizer = make_optimizer("adamw", [p for p in decoder.parameters() if p.requires_grad], LR, 0.0)
    ids, labels = _samples(steps)
    shifted = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], dim=1)
    watch, losses = Stopwatch(decoder, optimizer, steps), []

    class Data:
        def get(self, index: int) -> MicroBatch:
            rows = slice(index * BATCH, (index + 1) * BATCH)
            target = shifted[rows].flatten()
            positions = torch.arange(LENGTH).repeat(BATCH)
            return MicroBatch(
                ids[rows].flatten(), target, positions, (LENGTH,) * BATCH, (target != -100).nonzero().flatten(), BATCH
            )

    class Watch(Hook):
        def before_step(self, state) -> None:
            watch.begin(state.step)

        def after_step(self, state, record) -> None:
            watch.end()
            losses.append(record.loss)

    course = Course(steps, steps, 1, LR, "constant", 0.0)
    train(decoder, Data(), optimizer, course, TrainState(), clock, [Watch()])  # type: ignore[arg-type]
    return watch.result(losses)


def _trainer_peft(work: Path, steps: int, recompute: bool = False) -> dict:
    import transformers
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    transformers.logging.set_verbosity_error()
    base = AutoModelForCausalLM.from_pretrained(work / "model")
    model = PeftModel.from_pretrained(base, work / "start", is_trainable=True)
    ids, labels = _samples(steps)
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(rows)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                self.watch = Stopwatch(model, trainer.optimizer, steps)
            self.watch.begin(state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            self.watch.end()

    arguments = TrainingArguments(
        output_dir=str(work / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    watch = Watch()
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[watch])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return watch.watch.result(losses)


if __name__ == "__main__":
    main()
