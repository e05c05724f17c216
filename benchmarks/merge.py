"""How long a candidate takes, as a multiple of copying the same bytes, and beside mergekit.

    python benchmarks/merge.py                                        compiled and eager kernels, CPU
    python benchmarks/merge.py --mergekit .cache/mergekit/bin/python  and mergekit on the same files, in the same run
    python benchmarks/merge.py --device cuda --model 7b               on an accelerator, against its own copy
    python benchmarks/merge.py --device cuda --model 7b --stream      sources in pinned memory, against its copy rate

The floor is `copy_` over as many bytes: base and sources read once, the result written once.  Every repetition
measures floor and candidate one after the other, and every candidate has coefficients that no candidate had before.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from stopwatch import timed
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from evomerge.merge.bank.bank import Bank
from evomerge.merge.kernels.compiled import Compiled
from evomerge.merge.kernels.compiler import user_cache
from evomerge.merge.materialise import materialise
from evomerge.merge.measure.prepare import measure_sources
from evomerge.merge.methods import METHODS
from evomerge.merge.output.shards import open_writer
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.sources.fingerprint import model_fingerprint
from evomerge.sources.open_models import open_models

SOURCES = ["one", "two", "three"]
CASES = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.9},
    "slerp": {},
    "model_stock": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs_ties": {"density": 0.5},
    "sce": {"select_topk": 0.5},
}
MERGEKIT = ["linear", "slerp", "task_arithmetic", "model_stock", "ties", "dare_ties", "della"]

SIZES = {
    "tiny": (4096, 64, 256, 64, 2),
    "135m": (49152, 576, 1536, 192, 30),
    "1.5b": (151936, 1536, 8960, 256, 28),
    "7b": (32000, 4096, 11008, 4096, 8),
    "7b whole": (32000, 4096, 11008, 4096, 32),
}
"""(vocabulary, hidden, inner, keys, layers) of SmolLM2-135M, Qwen2.5-1.5B, and Llama-7B: eight of its layers (the rest
is more of the same), or all."""


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama of this size; see `SIZES`."""
    vocabulary, hidden, inner, keys, layers = SIZES[model]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (hidden,)}


def llama_config(layout: dict[str, tuple[int, ...]], dtype: str) -> dict[str, object]:
    """The config.json of a Llama with these tensors, its head tied to the embedding."""
    vocabulary, hidden = layout["model.embed_tokens.weight"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": layout["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("input_layernorm.weight") for name in layout),
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": layout["model.layers.0.self_attn.k_proj.weight"][0] // 64,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }


def write_models(
    folder: Path, model: str, names: Sequence[str] = SOURCES, device: str = "cpu", linked: bool = False
) -> dict[str, Path]:
    """A base of random weights and fine-tunes near it, bfloat16, written tensor by tensor.

    device: where the numbers are drawn.  linked: all fine-tunes are one file, which a bank does not know.
    """
    layout = shapes(model)
    config = llama_config(layout, "bfloat16")
    info = {n: (torch.bfloat16, s) for n, s in layout.items()}
    folders = {name: folder / name for name in ("base", *names)}
    for number, own in enumerate(folders.values()):
        own.mkdir(parents=True)
        (own / "config.json").write_text(json.dumps(config))
        Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(own / "tokenizer.json"))
        if linked and number > 1:
            os.link(folders[names[0]] / "model.safetensors", own / "model.safetensors")
            continue
        first = torch.Generator(device).manual_seed(0)  # the base's numbers, again for every fine-tune
        noise = torch.Generator(device).manual_seed(number)
        with open_writer(own / "model.safetensors", info) as writer:
            for shape in layout.values():
                x = (0.05 * torch.randn(shape, generator=first, device=device)).bfloat16()
                if number:
                    x = (x.float() + 0.002 * torch.randn(shape, generator=noise, device=device)).bfloat16()
                writer.write(x.cpu())
    return folders


def recipe(method: str, folders: dict[str, Path], seed: int) -> Recipe:
    """One recipe; another seed gives other coefficients, so that nothing of the last candidate helps the next."""
    spec = METHODS[method]
    names = SOURCES[: spec.sources[1]]
    shift = 1 + 0.001 * (seed % 97)
    shared = {k: v * shift for k, v in CASES[method].items()}
    if "weight" in spec.knobs:
        shared["weight"] = 0.4 * shift
    if "t" in spec.knobs:
        shared["t"] = 0.4 * shift
    return Recipe(
        method=method,
        seed=seed,
        base=Model(path=str(folders["base"])),
        sources=[RecipeSource(name=n, path=str(folders[n])) for n in names],
        parameters={k: v for k, v in shared.items() if k in spec.knobs},
    )


def floor(tensors: list[list[torch.Tensor]], out: list[torch.Tensor], stream: bool) -> None:
    """Read `tensors` once and write `out` once: copies that move as many bytes (a copy reads one and writes one).

    stream: the tensors lie in pinned memory, and what counts is their way to the device.
    """
    if stream:
        for model in tensors:
            for x, o in zip(model, out, strict=True):
                o.copy_(x, non_blocking=True)
        return
    moved = (len(tensors) + 1) / 2
    for model in tensors[: int(moved)]:
        for x, o in zip(model, out, strict=True):
            o.copy_(x)
    if moved % 1:
        for x, o in zip(tensors[int(moved)], out, strict=True):
            half = x.numel() // 2
            o.view(-1)[:half].copy_(x.view(-1)[:half])


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(method: str, folders: dict[str, Path], compiled: Compiled | None, args: argparse.Namespace) -> str:
    device = torch.device(args.device)
    names = SOURCES[: METHODS[method].sources[1]]
    models = open_models(folders["base"], {n: folders[n] for n in names})
    bank = Bank(models, device, capacity=0 if args.stream else None, compiled=compiled)
    out = {n: torch.zeros(i.shape, dtype=torch.bfloat16, device=device) for n, i in bank.models.base.tensors.items()}
    operands = [[bank.base(n) for n in bank.names], *([bank.source(s, n) for n in bank.names] for s in names)]
    if args.stream:  # the floor is then every source's way from pinned memory to the device
        operands = [[x.cpu().pin_memory() for x in model] for model in operands]
    floor(operands, list(out.values()), args.stream)
    if compiled:
        _ = compiled.scan  # compiled once per machine
    before = anonymous_bytes()
    inputs = {n: model_fingerprint(folders[n]) for n in ("base", *names)}
    cache = folders["base"].parent / ("cache" if compiled else "cache in torch")
    measured = bool(METHODS[method].measures)
    started = time.process_time()
    opening = timed(lambda: measure_sources(bank, method, names, cache, inputs), device)
    busy = time.process_time() - started
    again = Bank(bank.models, device)
    reopening = timed(lambda: measure_sources(again, method, names, cache, inputs), device)
    recipes = [recipe(method, folders, i) for i in range(args.repeat + 1 if compiled else max(1, args.repeat // 4))]
    merges, floors = [], []
    for made in recipes:
        floors.append(timed(lambda: floor(operands, list(out.values()), args.stream), device))
        merges.append(timed(partial(materialise, made, bank, out), device))
    if compiled and len(merges) > 1:
        merges, floors = merges[1:], floors[1:]  # the first loads or compiles its kernels
    ratio = statistics.median(m / f for m, f in zip(merges, floors, strict=True))
    beyond = (anonymous_bytes() - before) / 1e6
    read = sum(i.bytes for i in bank.models.base.tensors.values()) * (1 + len(names)) / 1e9
    cells = [
        f"{method:16}",
        "compiled" if compiled else "eager   ",
        f"{ratio:6.2f}x",
        f"{statistics.median(merges):7.3f} s",
        f"{beyond:6.0f} MB",
    ]
    if measured:
        cells.append(f"opened at {read / opening:.2f} GB/s ({busy:.1f} CPU s), from the cache in {reopening:.2f} s")
    times[method, compiled is not None] = statistics.median(merges)
    return "  ".join(cells)


times: dict[tuple[str, bool], float] = {}

MERGEKIT_SCRIPT = """
import json, sys, time, torch, yaml, logging
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.graph import Executor
from mergekit.architecture import arch_info_for_config, get_architecture_info
from mergekit.io.tasks import LoaderCache
import transformers
torch.set_num_threads(int(sys.argv[1]))
for method, text in json.load(sys.stdin).items():
    seconds = []
    for _ in range(1):
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
        options = MergeOptions(lazy_unpickle=False)
        LoaderCache().setup(options=options)
        model_config = transformers.AutoConfig.from_pretrained(str(config.referenced_models()[0].model.path))
        arch = get_architecture_info(config, options)
        started = time.perf_counter()
        planner = MergePlanner(config, arch, options=options, out_model_config=model_config)
        planner._plan()  # what plan_in_memory does before it wraps the tasks
        tasks = [task for _, task in planner._tensors]
        for task, value in Executor(tasks, math_device="cpu", storage_device="cpu").run(quiet=True):
            pass
        seconds.append(time.perf_counter() - started)
    print(json.dumps([method, min(seconds)]), flush=True)
"""


def mergekit_config(method: str, folders: dict[str, Path]) -> str:
    made = recipe(method, folders, 0)
    names = SOURCES[: METHODS[method].sources[1]]
    if method == "slerp":
        names = names[:1]
    shared = {k: v for k, v in made.parameters.items() if not METHODS[method].knobs[k].each}
    each = {k: v for k, v in made.parameters.items() if METHODS[method].knobs[k].each}
    models = [{"model": str(folders[n]), "parameters": each} for n in names]
    if method == "slerp":
        models.append({"model": str(folders["base"])})
    content: dict[str, object] = {"merge_method": method, "models": models, "dtype": "bfloat16", "parameters": shared}
    if method != "linear":
        content["base_model"] = str(folders["base"])
    return json.dumps(content)


def beside_mergekit(python: str, methods: list[str], folders: dict[str, Path]) -> None:
    """mergekit's in-memory path (plan and execute, nothing written) on the same files."""
    configs = {m: mergekit_config(m, folders) for m in methods if m in MERGEKIT}
    command = [python, "-W", "ignore", "-c", MERGEKIT_SCRIPT, str(torch.get_num_threads())]
    process = subprocess.run(command, input=json.dumps(configs), stdout=subprocess.PIPE, text=True, check=True)
    for line in process.stdout.splitlines():
        if line.startswith("["):
            method, seconds = json.loads(line)
            print(f"{method:16}  mergekit {seconds:7.2f} s   evomerge is {seconds / times[method, True]:5.1f}x faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES), default="135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stream", action="store_true", help="hold nothing on the device")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--methods", nargs="*", default=[m for m in CASES if m in METHODS])
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--no-compiled", action="store_true", help="only kernels in pieces")
    parser.add_argument("--mergekit", metavar="PYTHON", help="the Python of an environment that has mergekit")
    parser.add_argument("--folder", type=Path, help="where the models are written (default: a temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads, {args.device}, {args.model}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folders = write_models(Path(folder), args.model, device=args.device)
        compiled = Compiled(user_cache("kernels"), lambda line: print(line, file=sys.stderr))
        print("method            kernels   x floor     median    beyond sources and live model")
        for method in [] if args.no_compiled else args.methods:
            print(measure(method, folders, compiled, args), flush=True)
        if not args.no_eager:
            for method in args.methods:
                print(measure(method, folders, None, args), flush=True)
        if args.mergekit:
            beside_mergekit(args.mergekit, args.methods, folders)


if __name__ == "__main__":
    main()
