"""What a forward costs in each type, and how far the scores of one model lie apart in two of them.

    python benchmarks/forwards.py                                                   this processor
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/forwards.py  as one without bfloat16
    python benchmarks/forwards.py --scores runs/tiny

Models of random weights with the layers, widths and heads of real ones; fewer layers where that changes nothing but
the time.  One forward of each type is timed after the other; the ratio is of the tokens a second to those in float32.
`auto` is what a search would choose here.  Scores: every model of the family in OUT, its weights rounded to bfloat16,
on the items of evals/tiny, computed in bfloat16 (as the exported model computes) and in float32 (as a search may).
"""

import argparse
import platform
from functools import partial
from pathlib import Path

import numpy as np
import torch
from stopwatch import timed
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.config.tasks import TaskConfig
from evomerge.device import TORCH_DTYPES
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.standalone import evaluate_model
from evomerge.merge.compute_dtype import faster_type, measure
from evomerge.merge.live import open_live_model
from evomerge.merge.recipe.recipe import Dtype

EVALS = Path(__file__).resolve().parent.parent / "evals" / "tiny"
CPU = torch.device("cpu")
TYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
SIZES = {
    "tiny family": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "SmolLM2-135M, 6 of 30 layers": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "Qwen2.5-1.5B, 1 of 28 layers": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 1,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}


@torch.inference_mode()
def forwards(repeats: int, rows: int, length: int) -> None:
    print(f"forwards of {rows} x {length} tokens; tokens a second over those in float32, medians of {repeats}\n")
    print(f"{'':30}{'float32':>14}{'bfloat16':>10}{'float16':>10}{'auto for bfloat16':>20}")
    for name, sizes in SIZES.items():
        torch.manual_seed(0)
        ids = torch.randint(1000, (rows, length))
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).eval()
        shapes = [tuple(p.shape) for p in model.parameters()]
        live = {kind: LlamaForCausalLM(model.config).eval().to(TORCH_DTYPES[kind]) for kind in TYPES}
        seconds: dict[Dtype, list[float]] = {kind: [] for kind in TYPES}
        for _ in range(1 + repeats):
            for kind, other in live.items():
                seconds[kind].append(timed(partial(other, ids, use_cache=False), CPU))
        taken = {kind: float(np.median(found[1:])) for kind, found in seconds.items()}
        chosen = faster_type("bfloat16", measure("bfloat16", "cpu", shapes))
        rate = f"{rows * length / taken['float32']:,.0f}/s"
        ratios = "".join(f"{taken['float32'] / taken[kind]:>9.2f}x" for kind in TYPES[1:])
        print(f"{name:30}{rate:>14}{ratios}{chosen:>20}", flush=True)


def scores(family: Path, limit: int) -> None:
    print(f"\n{'':10}{'log-likelihood: mean, largest difference':>44}{'exact match: bfloat16, float32, differ':>54}")
    for folder in sorted(p.parent for p in family.glob("*/config.json")):
        found = {}
        for kind in ("bfloat16", "float32"):
            tasks = open_tasks(TaskConfig(task=str(f), objective="metric") for f in sorted(EVALS.glob("*.yaml")))
            tasks = [t for t in tasks if t.kind == "generate_until"]
            model, tokenizer = open_live_model(folder, None, "bfloat16", CPU, kind)
            results = evaluate_model(model, tokenizer, tasks, 4096, limit, Clock())
            found[kind] = {m: np.concatenate([r.raw[m] for r in results]) for m in ("gold_logprob", "exact_match")}
        gap = np.abs(found["bfloat16"]["gold_logprob"] - found["float32"]["gold_logprob"])
        hits = [found[kind]["exact_match"] for kind in ("bfloat16", "float32")]
        differ = f"{int((hits[0] != hits[1]).sum())} of {len(gap)}"
        logs = f"{gap.mean():.4f}, {gap.max():.4f}"
        print(f"{folder.name:10}{logs:>44}{f'{hits[0].mean():.4f}, {hits[1].mean():.4f}, {differ}':>54}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, help="a family of examples/tiny: compare scores instead of times")
    parser.add_argument("--limit", type=int, default=500, help="items of each task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 64), help="rows and their length")
    args = parser.parse_args()
    level = torch.backends.cpu.get_cpu_capability()
    print(f"{platform.machine()}, {level}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.scores:
        scores(args.scores, args.limit)
    else:
        forwards(args.repeats, *args.tokens)


if __name__ == "__main__":
    main()
