"""The engine's scores against those of lm-eval's HFLM on the same model: all kinds of task and of attention."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_tasks import metrics, write_task

from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.item_values import ItemMetrics
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.tasks import FEWSHOT_SEED, Task, items_of
from evomerge.evaluate.workload import Workload

TEXT = "the cat saw a small red house near our old river and they were glad of it when rain came down again"
UNICODE = "naïve café ☕ 日本語のテキスト 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 Straße 🙂"
TEMPLATE = (
    "{% for m in messages %}<|{{m.role}}|>{{m.content}}\n{% endfor %}{% if add_generation_prompt %}<|you|>{% endif %}"
)
LENGTH = 256

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
PACKED: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "gemma2": GROUPED | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": LENGTH},
    "gpt_neox": SIZES,
    "qwen3_moe": GROUPED | EXPERTS,
}
FALLING_BACK: dict[str, dict[str, Any]] = {
    "mistral": GROUPED | {"sliding_window": 24},  # attends to less than a row
    "mpt": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": LENGTH,
        "max_position_embeddings": LENGTH,
    },  # ALiBi
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": LENGTH},  # recurrent
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level, so that a character may be several tokens and a word one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def random_model(kind: str, sizes: dict[str, Any], dtype: torch.dtype, scale: float) -> Any:
    """A model whose weights are large enough that its answers depend on what it reads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **special, **sizes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "conv" not in name and "A_log" not in name:
                p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model.to(dtype).eval().requires_grad_(False)


def write_all(folder: Path) -> None:
    """Every kind of task; the few-shot ones have a long prefix in common, `truncated` more than the model takes."""
    words = TEXT.split()
    docs = []
    for k in range(20):
        turned = words[k:] + words[:k]
        choices = [" ".join(turned[:n]) for n in (1, 2, 3)] + ["ab" * (1 + k % 3)]  # one begins as the next
        docs.append({"prompt": f"{' '.join(turned[4 : 8 + k % 5])}:", "choices": choices, "gold": k % 4})
    ask = {"doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
    choice = {"output_type": "multiple_choice", "target_delimiter": " "} | ask
    both = metrics("acc", "acc_norm")
    shots = {"training_split": "train", "fewshot_split": "train", "train": docs[6:]}
    more, docs = docs, docs[:12]
    write_task(folder, "unequal", docs, **choice, metric_list=metrics("acc", "acc_norm", "brier_score"))
    letters = [d | {"choices": list("abcd")} for d in docs]
    write_task(folder, "single", letters, **(choice | {"target_delimiter": ""}), metric_list=metrics("acc"))
    fixed = {"num_fewshot": 3, "fewshot_config": {"sampler": "first_n"}}
    write_task(folder, "shots", more, **choice, **shots, **fixed, description=TEXT + "\n", metric_list=both)
    write_task(folder, "drawn_shots", docs[:6], **choice, **shots, num_fewshot=2, metric_list=both)
    foreign = [
        d | {"prompt": UNICODE[k:], "choices": [UNICODE[:k], "日本", "🙂☕", "ß"]} for k, d in enumerate(docs, 1)
    ]
    write_task(folder, "unicode", foreign, **choice, metric_list=both)
    long = [d | {"prompt": " ".join(words[k:] * 16)} for k, d in enumerate(docs[:5])]
    write_task(folder, "truncated", long, **choice, metric_list=both)
    answers = [{"prompt": d["prompt"], "answer": d["choices"][2]} for d in docs]
    answer = {"doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}", "target_delimiter": " "}
    write_task(
        folder, "answer", answers, output_type="loglikelihood", **answer, metric_list=metrics("perplexity", "acc")
    )
    write_task(
        folder,
        "rolling",
        [{"text": (TEXT + " " + UNICODE) * n} for n in (1, 2, 5)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=metrics("word_perplexity", "bits_per_byte"),
    )
    for name, options in {"generation": {}, "shots_generation": shots | fixed | {"train": answers[6:]}}.items():
        write_task(
            folder,
            name,
            answers[:6],
            output_type="generate_until",
            **answer,
            **options,
            generation_kwargs={"until": ["ou", " the", "\n\n", "e", "ï"], "do_sample": False, "max_gen_toks": 12},
            metric_list=metrics("exact_match"),
        )


@dataclass
class Pair:
    """Both programs' answers.  ours, work: by task.  theirs: task -> lm-eval's records in the data's order."""

    engine: Engine
    tasks: dict[str, Task]
    ours: dict[str, ItemMetrics]
    work: dict[str, Workload]
    theirs: dict[str, list[dict[str, Any]]]
    log: list[str]


def score_with_both(model: Any, tokenizer: Any, folder: Path, chat: bool = False, only: tuple[str, ...] = ()) -> Pair:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    log: list[str] = []
    engine = Engine(model, tokenizer, 300, log.append)
    files = [f for f in sorted(folder.glob("*.yaml")) if not only or f.stem in only]
    tasks = open_tasks(TaskConfig(task=str(file), apply_chat_template=chat) for file in files)
    work = {t.name: engine.prepare(t, items_of(t, t.docs), everything=True) for t in tasks}
    ours = {name: engine.score(w, Clock()) for name, w in work.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # lm-eval reads data files from where it stands
        found = TaskManager(include_path=str(folder), include_defaults=False).load([f.stem for f in files])
        for task in found["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        results = evaluator.evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32"),
            task_dict=found,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    theirs = {name: sorted(records, key=lambda r: r["doc_id"]) for name, records in results["samples"].items()}
    return Pair(engine, {t.name: t for t in tasks}, ours, work, theirs, log)


def check_log_likelihoods(pair: Pair, tolerance: float, a_token: bool = False) -> int:
    """Compares every log-likelihood; returns how many.  a_token: the tolerance is for each scored token.

    Rolling ones, which add up hundreds of tokens, are compared relative to their size.
    """
    count = 0
    for name, records in pair.theirs.items():
        work = pair.work[name]
        if pair.tasks[name].kind == "generate_until":
            continue
        for asked, record in zip(work.items, records, strict=True):
            for instance, span, (theirs,) in zip(asked.instances, asked.spans, record["resps"], strict=True):
                (ours,) = instance.resps
                allowed = tolerance * (asked.rows[span.start].scored if a_token else 1)
                if pair.tasks[name].kind == "loglikelihood_rolling":
                    assert ours == pytest.approx(theirs, abs=tolerance, rel=1e-6), name
                else:
                    assert ours[0] == pytest.approx(theirs[0], abs=allowed), name
                count += 1
    return count


def check_metrics(pair: Pair) -> None:
    """Compares accuracies, exact matches, greedy flags and texts: these are the same or they are not."""
    for name, records in pair.theirs.items():
        task, found = pair.tasks[name], pair.ours[name]
        for metric in {"acc", "acc_norm", "exact_match"} & set(task.metrics):
            assert found[metric] == [r[metric] for r in records], (name, metric)
        for asked, record in zip(pair.work[name].items, records, strict=True):
            if task.kind == "generate_until":
                assert asked.instances[0].resps[0] == record["resps"][0][0], name
            elif task.kind != "loglikelihood_rolling":
                assert [i.resps[0][1] for i in asked.instances] == [r[0][1] for r in record["resps"]], name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tasks")
    write_all(found)
    return found


@pytest.fixture(scope="module", params=list(PACKED))
def pair(request: pytest.FixtureRequest, tokenizer: Any, folder: Path) -> Pair:
    return score_with_both(random_model(request.param, PACKED[request.param], torch.float32, 0.3), tokenizer, folder)


def test_models_with_ordinary_attention_support_every_kind_of_forward(pair: Pair) -> None:
    capabilities = pair.engine.capabilities
    assert (capabilities.packs, capabilities.trunks, capabilities.steps) == (True, True, True)
    assert pair.log == []


def test_log_likelihoods_are_lm_evals(pair: Pair) -> None:
    assert check_log_likelihoods(pair, 1e-4) > 200


def test_accuracies_and_texts_are_lm_evals(pair: Pair) -> None:
    check_metrics(pair)


def test_the_comparison_covers_different_cases(pair: Pair) -> None:
    """Some answers are right and some wrong; texts differ; prompts were cut; prefixes were shared."""
    right = [x for found in pair.ours.values() for m in ("acc", "acc_norm") for x in found.get(m, [])]
    assert 0 < sum(right) < len(right)
    assert len({r["resps"][0][0] for name in ("generation", "shots_generation") for r in pair.theirs[name]}) > 1
    assert max(len(row.tokens) for row in pair.work["truncated"].rows) == LENGTH + 1
    assert any(batch.trunk for batch in pair.work["shots"].batches)
    assert any(batch.trunk for batch in pair.work["shots_generation"].generations)
    assert len(pair.work["rolling"].items[2].spans[0]) > 1


def test_smooth_choice_metrics_follow_from_lm_evals_log_likelihoods(pair: Pair) -> None:
    found = pair.ours["unequal"]
    for k, record in enumerate(pair.theirs["unequal"]):
        lls, gold = [r[0][0] for r in record["resps"]], record["doc"]["gold"]
        others = [x for n, x in enumerate(lls) if n != gold]
        assert found["margin"][k] == pytest.approx(lls[gold] - max(others), abs=2e-4)
        assert (found["margin"][k] > 0) == bool(record["acc"])
        right, probabilities = record["brier_score"]
        squares = sum((p - (n == right)) ** 2 for n, p in enumerate(probabilities))
        assert found["brier"][k] == pytest.approx(squares, abs=1e-4)
        assert (found["choice_logprob"][k] > -math.log(2)) <= bool(record["acc"])
        lengths = [len(choice) for choice in record["doc"]["choices"]]
        scaled = [x / n * sum(lengths) / len(lengths) for x, n in zip(lls, lengths, strict=True)]
        share = math.exp(scaled[gold]) / sum(map(math.exp, scaled))
        expected = math.log((share + math.exp(-6)) / (1 + math.exp(-6)))
        assert found["choice_logprob_norm"][k] == pytest.approx(expected, abs=2e-4)
        assert (scaled[gold] == max(scaled)) == bool(record["acc_norm"])
        size = len((" " + record["doc"]["choices"][gold]).encode())
        assert found["bits_per_byte"][k] == pytest.approx(-lls[gold] / size / 0.6931471805599453, abs=1e-4)


def test_prompts_of_a_chat_template_are_lm_evals(tokenizer: Any, folder: Path) -> None:
    model = random_model("llama", PACKED["llama"], torch.float32, 0.3)
    only = ("unequal", "shots", "generation", "shots_generation")
    pair = score_with_both(model, tokenizer, folder, chat=True, only=only)
    for name, records in pair.theirs.items():
        for asked, record in zip(pair.work[name].items, records, strict=True):
            assert [i.args[0] for i in asked.instances] == [a[0] for a in record["arguments"]]
    assert "<|user|>" in pair.work["shots"].items[0].instances[0].args[0]
    check_log_likelihoods(pair, 1e-4)
    check_metrics(pair)


@pytest.mark.parametrize("kind", list(PACKED))
def test_bfloat16_log_likelihoods_are_near_lm_evals(tokenizer: Any, folder: Path, kind: str) -> None:
    """Each token's is within 2e-2: a sum over many adds up their roundings, and those that tip an expert's choice."""
    model = random_model(kind, PACKED[kind], torch.bfloat16, 0.1)
    pair = score_with_both(model, tokenizer, folder, only=("unequal", "single", "shots", "unicode"))
    assert pair.engine.capabilities.packs
    check_log_likelihoods(pair, 2e-2, a_token=True)


@pytest.mark.parametrize("kind", list(FALLING_BACK))
def test_other_kinds_of_model_get_one_row_a_sequence_and_say_so(tokenizer: Any, folder: Path, kind: str) -> None:
    model = random_model(kind, FALLING_BACK[kind], torch.float32, 0.3)
    only = ("unequal", "single", "shots", "rolling", "generation")
    pair = score_with_both(model, tokenizer, folder, only=only)
    assert not any(batch.trunk for work in pair.work.values() for batch in work.batches)
    assert any("one row a sequence" in line for line in pair.log)
    assert any("HFLM generates" in line for line in pair.log) == (kind == "mamba")
    check_log_likelihoods(pair, 1e-4)
    check_metrics(pair)


def test_an_empty_answer_is_refused_where_lm_eval_breaks(tokenizer: Any, tmp_path: Path) -> None:
    model = random_model("llama", PACKED["llama"], torch.float32, 0.3)
    docs = [{"prompt": p, "choices": ["b", last], "gold": 0} for p, last in (("a", "c"), ("b", ""))]
    ask = {"doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
    write_task(tmp_path, "empty", docs, output_type="multiple_choice", **ask, metric_list=metrics("acc"))
    (task,) = open_tasks([TaskConfig(task=str(tmp_path / "empty.yaml"))])
    engine = Engine(model, tokenizer, 300)
    items = items_of(task, task.docs)
    with pytest.raises(EvomergeError, match="task empty: an item has an empty answer"):
        engine.prepare(task, items, everything=True)
    with pytest.raises(AssertionError):
        engine.lm.loglikelihood(engine.requests.instances(task, items[1])[1:], disable_tqdm=True)


def test_a_chat_template_that_is_not_there_is_an_error(tokenizer: Any, folder: Path) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    (task,) = open_tasks([TaskConfig(task=str(folder / "unequal.yaml"), apply_chat_template=True)])
    engine = Engine(random_model("llama", PACKED["llama"], torch.float32, 0.3), bare, 300)
    with pytest.raises(EvomergeError, match="the tokenizer has no chat template"):
        engine.prepare(task, items_of(task, task.docs), everything=True)
