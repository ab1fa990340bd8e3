"""The figures of ``results.py``: where each stands in the JSON of its study or benchmark, or how it is counted."""

from collections.abc import Callable, Sequence
from functools import cache
from statistics import mean
from typing import Any

import study_lisa
import study_loraprune
from memory_table import HOST, budget
from study_loram import shares as loram_shares

from effitrain.core.plan import Plan, make_plan
from effitrain.core.presets import find_preset
from effitrain.core.recipe import make_recipe
from effitrain.core.spec import spec_from_config
from study.promises import Bound, Counted, Figure, OnCard, Row, Slow, Tested

GIB = 2**30
STREAMED_70B = (
    "--model llama-70b --fit stream --resident-layers 0 --batch-size 1 --optimizer adamw --stream-order micro-batch"
    " --max-seq-len "
)
CPU, LISA, S2, STREAM = (f"benchmarks/{name}.json" for name in ("cpu", "lisa", "s2", "stream"))
LORAM, LORAPRUNE, LISA_STUDY, LONG = (f"docs/study_{name}.json" for name in ("loram", "loraprune", "lisa", "longlora"))
MADE_BY = {
    CPU: "scripts/bench_cpu.py --out benchmarks/cpu.json",
    LISA: "scripts/bench_lisa.py --out benchmarks/lisa.json",
    S2: "scripts/bench_s2.py --out benchmarks/s2.json",
    STREAM: "scripts/bench_stream.py --out benchmarks/stream.json",
    LORAM: "scripts/study_loram.py -o docs",
    LORAPRUNE: "scripts/study_loraprune.py -o docs",
    LISA_STUDY: "scripts/study_lisa.py -o docs",
    LONG: "scripts/study_longlora.py -o docs",
}


def of_file(promise: str, bound: Bound, file: str, pick: Any) -> Row:
    """A row whose figure stands in ``file``, at the keys ``pick`` or by a function of its content."""
    keys = pick.split("/") if isinstance(pick, str) else ()
    return Row(promise, Figure(bound, file, MADE_BY[file], (lambda known: _at(known, keys)) if keys else pick))


def slow(promise: str, bound: Bound, name: str) -> Row:
    """A row of a long check."""
    return Row(promise, Slow(bound, name))


def tested(promise: str, bound: str, *tests: str) -> Row:
    """A row that tests hold."""
    return Row(promise, Tested(bound, tests))


def counted(promise: str, bound: Bound, command: str, count: Callable[[], float]) -> Row:
    """A row that is counted now."""
    return Row(promise, Counted(bound, command, count))


def planned(promise: str, bound: Bound, flags: str, count: Any = lambda plan: plan.peak_bytes / GIB) -> Row:
    """A row that counts something of the plan that ``flags`` ask for, with 64 GiB of host memory."""
    return Row(
        promise, Counted(bound, f"effitrain plan {flags} --gpu rtx4090 --host-mem 64G", lambda: count(plan(flags)))
    )


def on_card(promise: str, bound: str, command: str = "scripts/gpu_suite.sh") -> Row:
    """A row that waits for a card."""
    return Row(promise, OnCard(bound, command))


def _at(known: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        known = known[key]
    return known


@cache
def plan(flags: str) -> Plan:
    """The plan of ``--flag value`` pairs for an RTX 4090."""
    words = flags.split()
    asked = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    found = find_preset(asked["model"])
    assert found is not None
    recipe = make_recipe({"gpu": "rtx4090", "host_mem": HOST, **asked})
    return make_plan(spec_from_config(found.config, asked["model"]), recipe, budget(recipe))


def ledger_line(what: str) -> Any:
    """A function from a plan to the bytes of a line of its ledger."""
    return lambda plan: sum(entry.bytes for entry in plan.ledger if entry.what == what)


def resident_layers(plan: Plan) -> int:
    """How many of 80 layers stay on the card."""
    return 80 - plan.settings.streamed


def loram_share(parts: str, align: str, ratio: float) -> Any:
    """A function from the LoRAM study to the mean share of the gain, by Wanda's score."""
    return lambda known: mean(loram_shares(known["runs"])[parts, "wanda", align, ratio])


def perplexity(known: Any, method: str, ratio: float = 0.5) -> float:
    """The mean validation perplexity of a method at its best rate."""
    return mean(run["perplexity"] for run in study_loraprune.at_best(known["runs"])[ratio, method])


def over_loraprune(method: str) -> Any:
    """A function from the LoRAPrune study to its perplexity over that of another method."""
    return lambda known: perplexity(known, "loraprune") / perplexity(known, method)


def loraprune_seeds(known: Any) -> int:
    """The fewest seeds of a method at half, at its best rate."""
    found = study_loraprune.at_best(known["runs"])
    return min(len(found[0.5, method]) for method in study_loraprune.METHODS)


def ratios_of_loraprune(known: Any) -> int:
    """At how many ratios each method was measured."""
    found = study_loraprune.at_best(known["runs"])
    ratios = {ratio for ratio, _ in found}
    return sum(all((ratio, method) in found for method in study_loraprune.METHODS) for ratio in ratios)


def delta_gain(text: str) -> Any:
    """A function from the LISA study to the gain of lisa-delta at rank 64 over that of LISA, each at its best rate."""

    def share(known: Any) -> float:
        runs, base = known["runs"], known["base"][text]
        whole = {"method": "lisa", "lisa_interval": study_lisa.interval_of(runs, text)}
        arms = ({"text": text, **arm} for arm in ({"method": "lisa-delta", "lora_r": 64}, whole))
        delta, lisa = (base - mean(study_lisa.best(runs, arm)[1]) for arm in arms)
        return delta / lisa

    return share


def lisa_seeds(known: Any) -> int:
    """The fewest seeds of LISA, LoRA and full tuning at their best rates on both texts."""
    arms = [
        {
            "text": text,
            "method": method,
            **({"lisa_interval": study_lisa.interval_of(known["runs"], text)} if method == "lisa" else {}),
        }
        for text in known["base"]
        for method in ("lisa", "lora", "full")
    ]
    return min(len(study_lisa.best(known["runs"], arm)[1]) for arm in arms)


def last_quarter(arm: str, over: str = "", at: int | None = None) -> Any:
    """A function from the LongLoRA study to how far an arm's loss at 1,536-2,048 is off that of another arm there, or
    off its own in bucket ``at``.
    """

    def off(known: Any) -> float:
        losses = {run["arm"]: run["losses"] for run in known["runs"]}
        other = mean(losses[over][6:]) if at is None else losses[arm][at]
        return mean(losses[arm][6:]) / other - 1

    return off
