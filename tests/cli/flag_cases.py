"""What each flag of each verb is given in ``test_every_flag``, and beside what."""

from typing import NamedTuple


class Case(NamedTuple):
    """A flag as it is given.

    Attributes:
        given: what follows it.
        beside: flags that it needs; they are there with it and without it.
        said: words of the message that refuses it, where it is refused.
        nothing: it is a flag of training that takes no memory, and ``plan`` is the same with it and without it.
        dry: of ``run``, a flag that shows in its plan. What comes of the plan is shown where ``slow`` tests are run.
    """

    given: str = ""
    beside: str = ""
    said: str = ""
    nothing: bool = False
    dry: bool = False


DATA = {
    "--dataset": Case("other.jsonl"),
    "--format": Case("text"),
    "--columns": Case("completion=text"),
    "--template": Case("chatml"),
    "--train-on-prompt": Case(),
    "--truncation": Case("left", "--max-seq-len 64"),
    "--join-documents": Case(beside="--format text --max-seq-len 64"),
}
MODEL = {
    "--config": Case("recipe.yaml"),
    "--model": Case("second"),
    "--weights": Case("synthetic:7"),
    "--gpu-mem": Case("1M", said="The model needs"),
    "--host-mem": Case("1M", said="The host needs"),
    "--quant": Case("none", "--quant nf4"),
    "--dtype": Case("bf16"),
    "--max-seq-len": Case("64"),
    "--seed": Case("1"),
}
PRUNING = {
    "--prune-ratio": Case("0.25"),
    "--prune-parts": Case("ffn"),
    "--prune-round": Case("32"),
    "--prune-exempt": Case("1,0"),
    "--prune-score": Case("magnitude"),
    "--prune-ranking": Case("global"),
    "--align": Case("bias"),
    "--calib-dataset": Case("other.jsonl"),
}
PRUNED = "--fit prune --prune-ratio 0.5 --prune-exempt 0,0 --prune-round 1"
LISA = "--method lisa --lisa-layers 1 --lisa-interval 1 --no-lisa-train-embeddings"
LARGE = "--model llama-70b --weights synthetic --gpu-mem 20G --host-mem 64G --gpu rtx4090 --batch-size auto --quant nf4"
MEMORY = {
    "--model": Case("second"),
    "--gpu-mem": Case("8G"),
    "--host-mem": Case("1M", said="The host needs"),
    "--gpu": Case("t4"),
    "--fit": Case("stream"),
    "--prefer": Case("fast", LARGE),
    "--resident-layers": Case("0", "--fit stream"),
    "--stream-order": Case("layer", "--fit stream --batch-size 1 --grad-accum 2 --stream-order micro-batch"),
    "--quant": Case("nf4"),
    "--dtype": Case("fp16"),
    "--recompute": Case("layer"),
    "--offload-activations": Case("on"),
    "--mlp-tiles": Case("4"),
    "--prune-ratio": Case("0.25", PRUNED),
    "--prune-parts": Case("ffn", PRUNED),
    "--prune-round": Case("32", PRUNED),
    "--prune-exempt": Case("1,0", PRUNED),
    "--prune-method": Case("loraprune", PRUNED),
    "--small-model": Case("nowhere"),
    "--max-seq-len": Case("64"),
    "--batch-size": Case("2"),
    "--grad-accum": Case("3"),
    "--optimizer": Case("adamw8bit"),
    "--lisa-state": Case("keep-host", LISA),
}
BOTH = {
    "--config": Case("recipe.yaml"),
    "--prune-score": Case("random", PRUNED),
    "--align": Case("bias", PRUNED),
    "--lr": Case("0.001"),
    "--attention": Case("s2"),
    "--s2-group": Case("20", "--attention s2"),
    "--rope-scaling": Case("yarn", "--rope-factor 2"),
    "--rope-factor": Case("4", "--rope-scaling linear --rope-factor 2"),
    "--train-norms": Case(),
    "--train-embeddings": Case(),
    "--method": Case("full"),
    "--lora-r": Case("2"),
    "--lora-dropout": Case("0.5"),
    "--lora-targets": Case("q_proj"),
    "--lisa-layers": Case("2", LISA),
    "--lisa-interval": Case("2", f"{LISA} --max-steps 2 --quant nf4"),
    "--lisa-train-embeddings": Case(beside=LISA),
    "--max-steps": Case("1", f"{LISA} --max-steps 3 --quant nf4"),
}
TRAINING = {
    **DATA,
    "--weights": Case("synthetic:7"),
    "--packing": Case(),
    "--eval-dataset": Case("other.jsonl"),
    "--eval-fraction": Case("0.5"),
    "--eval-every": Case("1"),
    "--output-dir": Case("elsewhere"),
    "--save-every": Case("4"),
    "--keep-checkpoints": Case("1"),
    "--resume": Case("nowhere", said="nowhere"),
    "--report-to": Case("wandb"),
    "--prune-ranking": Case("global", PRUNED),
    "--calib-dataset": Case("other.jsonl", PRUNED),
    "--schedule": Case("constant"),
    "--warmup": Case("0.9"),
    "--epochs": Case("2"),
    "--seed": Case("1"),
    "--weight-decay": Case("0.5"),
    "--max-grad-norm": Case("0.001"),
    "--lora-alpha": Case("4"),
    "--lora-rslora": Case(),
    "--init-adapter": Case("finished"),
    "--lisa-sampling": Case("shuffle", f"{LISA} --max-steps 6"),
}
NO_CARD = "no CUDA card"
SMALL = "--model tiny --max-seq-len 64 --fit stream --quant none --resident-layers 0 --gpu-mem 4M"
CASES = {
    "plan": {
        **MEMORY,
        "--small-model": Case("nowhere", said="nowhere holds no config.json"),
        **BOTH,
        **{flag: case._replace(said="", nothing=True) for flag, case in TRAINING.items()},
        **{flag: TRAINING[flag] for flag in ("--prune-ranking", "--calib-dataset")},  # other ways leave them out
        "--prove": Case(),
        "--json": Case(),
    },
    "run": {
        **{flag: case._replace(dry=True) for flag, case in MEMORY.items()},
        **BOTH,
        **TRAINING,
        "--small-model": Case("nowhere", said="There is no keep map nowhere"),
        "--prove": Case(),
        "--dry-run": Case(),
        "--json": Case(),
        "--quiet": Case(),
    },
    "eval": {
        **MODEL,
        **DATA,
        "--packing": Case(beside="--max-seq-len 64 --batch-size 2"),
        "--batch-size": Case("999", "--gpu-mem 2M", said="The model needs"),
        "--seed": Case("1", "--passkey 300"),
        "--fit": Case("stream"),
        "--resident-layers": Case("5", SMALL, said="The model needs"),
        "--adapter": Case("finished"),
        "--by-position": Case("16"),
        "--passkey": Case("300"),
        "--json": Case(),
    },
    "chat": {
        **MODEL,
        "--quant": Case("none", "--max-new-tokens 150 --quant nf4"),
        "--dtype": Case("bf16", "--max-new-tokens 150"),
        "--max-seq-len": Case("8", said="8"),
        "--batch-size": Case("999", "--gpu-mem 2M", said="The model needs"),
        "--template": Case("chatml"),
        "--fit": Case("stream"),
        "--resident-layers": Case("5", SMALL, said="The model needs"),
        "--adapter": Case("finished"),
        "--prompt": Case("Goodbye"),
        "--max-new-tokens": Case("3"),
        "--temperature": Case("0.1"),
    },
    "prune": {
        **PRUNING,
        **DATA,
        "--config": Case("recipe.yaml"),
        "--model": Case("second"),
        "--packing": Case(beside="--align train"),
        "--eval-dataset": Case("other.jsonl"),
        "--eval-fraction": Case("0.5"),
        "--seed": Case("1", "--prune-score random"),
        "--quant": Case("nf4", "--align train --quant none"),
        "--dtype": Case("bf16"),
        "--max-seq-len": Case("64"),
        "--rope-scaling": Case("yarn", "--rope-factor 2"),
        "--rope-factor": Case("2"),
        "--output-dir": Case("elsewhere"),
    },
    "recover": {
        "--config": Case("recipe.yaml"),
        "--model": Case("second", said="second"),
        "--output-dir": Case("elsewhere"),
        "--adapter": Case("finished", said="another model"),
        "--keep": Case("nowhere", said="nowhere"),
    },
    "export": {
        "--config": Case("recipe.yaml"),
        "--model": Case("second", said="second"),
        "--output-dir": Case("elsewhere"),
        "--adapter": Case("finished-too"),
        "--to": Case("merged"),
    },
    "doctor": {},
    "store ls": {},
    "store verify": {},
    "store rm": {},
    "bench kernels": {
        "--shapes": Case("8B", said=NO_CARD),
        "--tokens": Case("8", said=NO_CARD),
        "--rank": Case("4", said=NO_CARD),
        "--json": Case(said=NO_CARD),
    },
    "bench step": {
        "--model": Case("model"),
        "--rows": Case("3"),
        "--length": Case("64"),
        "--rank": Case("2"),
        "--steps": Case("1"),
        "--json": Case(),
    },
}
SHAPE = "--model model --quant none --batch-size 3 --grad-accum 1 --max-seq-len 96 --gpu-mem 32G --host-mem 32G"
BASE = {
    "plan": f"{SHAPE} --json",
    "run": f"{SHAPE} --dataset rows.jsonl --save-every 2 --eval-fraction 0.2",
    "eval": "--model model --dataset rows.jsonl --gpu-mem 1G --host-mem 8G --json",
    "chat": "--model model --gpu-mem 1G --host-mem 8G --prompt Hello --max-new-tokens 12 --temperature 1",
    "prune": "--model model --dataset rows.jsonl --prune-ratio 0.5 --prune-exempt 0,0 --prune-round 1",
    "recover": "--model model --adapter finished-small/adapter-small --keep finished-small",
    "export": "--model model --adapter finished",
    "bench kernels": "",
    "bench step": "",
}
