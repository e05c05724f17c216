"""What a file of mergenetic means here.

Its method is not in the file: mergenetic's own scripts take slerp for one language and dare_ties for several, or for
tasks in a list.
"""

import os
from pathlib import Path
from typing import Any

from evomerge.merge.mergekit.parse_mergekit import short_repr
from evomerge.start.migrate.draft import Draft, source_names, study_name
from evomerge.start.yaml_text import plain, relative

PROGRAM = "mergenetic"
MARKS = {"run_id", "pop_size", "n_iter"}
NOT_CARRIED = {
    "path_to_store_config": "a search keeps all it makes in runs/NAME",
    "path_to_store_merged_model": "candidates are made in memory; `--out` or `evomerge export` writes the winner",
    "bench": "it names the questions that mergenetic's estimates were fitted on",
    "mode": "scores are not estimated from a few items; races stop bad candidates after a few",
    "eval_batch_size": "`batch_tokens` is measured on the device",
    "load_in_4bit": "candidates are scored as they are exported, in `dtype`",
    "eager_mode": "transformers' default attention is used",
    "force_evaluation": "base and sources are scored once in every search",
    "task_type": "a task's own file says how answers are scored",
}
TOP = """run_id pop_size n_iter models base_model langs tasks datasets metric n_samples seed dtype device
    additional_templates_folder""".split()


def write(content: dict[str, Any], draft: Draft) -> None:
    """Write the lines of the configuration for a file's content; problems are collected in the draft."""
    top = draft.mapping("", content, [*TOP, *NOT_CARRIED])
    for key, why in NOT_CARRIED.items():
        if top.get(key) is not None:
            draft.leave_out(key, why)
    add_task_folder(top, draft)
    draft.add(f"name: {plain(study_name(str(top.get('run_id') or draft.old.stem)))}")
    langs = draft.read_list("langs", top["langs"], draft.text) if top.get("langs") is not None else None
    tasks = tasks_of(top, langs, draft)
    write_models(top, langs, len(tasks), draft)
    write_tasks(top, tasks, draft)
    write_rest(top, len(tasks), draft)


def add_task_folder(top: dict[str, Any], draft: Draft) -> None:
    """Look for task files in `additional_templates_folder` too, beside the file or in the working folder."""
    text = top.get("additional_templates_folder")
    if text is None or draft.text("additional_templates_folder", text) is None:
        return
    found = [folder / text for folder in (draft.old.parent, Path.cwd()) if os.path.isdir(folder / text)]
    if found:
        draft.task_folders.append(found[0])
    elif not draft.task_folders:
        draft.leave_out("additional_templates_folder", f"no folder {text} here; give it with --task-search-path")


def tasks_of(top: dict[str, Any], langs: list[str] | None, draft: Draft) -> dict[str, str]:
    """Language or number -> the task that candidates are scored on, or the data file of a task that is to be made."""
    if isinstance(top.get("tasks"), list):
        return {str(number): task for number, task in enumerate(draft.read_list("tasks", top["tasks"], draft.text))}
    key = "tasks" if top.get("tasks") is not None else "datasets"
    given = draft.mapping("tasks", top["tasks"], ["search", "test"]).get("search") if key == "tasks" else top.get(key)
    where = "tasks.search" if key == "tasks" else key
    if not isinstance(given, dict) or not given:
        draft.add_problem(where, f"expected a mapping from language to task, found {short_repr(given)}")
        return {}
    if key == "datasets":
        draft.task_folders.clear()
    wanted = [lang for lang in given if lang != "base"] if langs is None else langs
    found = {str(lang): draft.text(f"{where}.{lang}", given.get(lang)) for lang in wanted}
    test = top["tasks"].get("test") if key == "tasks" else None
    for lang, task in found.items():
        if isinstance(test, dict) and test.get(lang) not in (None, task):
            draft.leave_out(
                f"tasks.test.{lang}, {test[lang]}",
                "the winner is judged on unseen items of the searched task; `evomerge evaluate` scores it elsewhere",
            )
    return {lang: task for lang, task in found.items() if task is not None}


def write_models(top: dict[str, Any], langs: list[str] | None, tasks: int, draft: Draft) -> None:
    """Write base, sources, method and space."""
    base = draft.path("base_model", top.get("base_model"))
    given = top.get("models")
    if isinstance(given, list):
        listed = draft.read_list("models", given, draft.path)
        models = dict(zip(source_names(listed), listed, strict=True))
    elif isinstance(given, dict):
        wanted = list(given) if langs is None else [lang for lang in langs if lang in given]
        paths = [draft.path(f"models.{lang}", given[lang]) for lang in wanted]
        models = {n: p for n, p in zip(source_names(map(str, wanted)), paths, strict=True) if p}
    else:
        draft.add_problem("models", f"expected a mapping from language to model, found {short_repr(given)}")
        return
    single = tasks == 1 and isinstance(top.get("tasks") or {}, dict)
    others = {name: path for name, path in models.items() if path != base}
    if not others:
        draft.add_problem("models", "there is none besides the base model")
        return
    draft.add(f"base: {plain(base or '')}")
    lost = "without the base model, whose difference from itself is zero: its weight had no effect"
    draft.add("sources:", *([lost] if len(others) < len(models) else []))
    for name, path in others.items():
        draft.add(f"- {{name: {plain(name)}, path: {plain(path)}}}")
    if single:
        draft.add("method: slerp", "mergenetic's script for one language")
        draft.add("space:")
        draft.add("  t: [0.0, 1.0]", "in steps of 0.1 in mergenetic")
        draft.add("  granularity: depth")
        draft.add("  knots: 5", "mergenetic has 5 for attention and for mlp, and one value for the rest")
        draft.add("  components: [attention, mlp]")
    else:
        draft.add("method: dare_ties", "mergenetic's script for several tasks")
        draft.add("space:")
        draft.add("  weight: [0.0, 1.0]")
        draft.add("  density: [0.1, 1.0]", "0 .. 1 in mergenetic; here 0 keeps nothing")
        draft.add("  rescale: l1", "as in mergekit; the papers' factor is `expected`")


def write_tasks(top: dict[str, Any], tasks: dict[str, str], draft: Draft) -> None:
    """Write the tasks, and how many items each split gets."""
    metric = draft.text("metric", top["metric"]) if top.get("metric") is not None else None
    differences = [
        "Trials climb by a smooth objective that fits the task; the metric is what the winner is judged by.  To search "
        "by the metric alone, give the task `objective:` with its name."
    ]
    has_data = top.get("tasks") is None
    if has_data:
        differences.append(
            "The file has data instead of tasks: make each task with `evomerge new-task DATA.csv`, and look at it.  "
            "mergenetic also checks the language of an answer, evomerge does not."
        )
    draft.add("tasks:", *differences)
    for task in dict.fromkeys(tasks.values()):
        if has_data:
            data = next((f for f in (draft.old.parent / task, Path(task)) if os.path.isfile(f)), Path(task))
            made = data.with_suffix(".yaml")
            draft.add(f"- {{task: {plain(relative_file(made, draft))}}}", f"evomerge new-task {task}")
        else:
            entry, more = draft.task(task, metric=metric)
            draft.add(entry, *more)
    count = draft.whole("n_samples", top.get("n_samples", 20))
    if count is not None:
        draft.add(
            f"splits: {{search: {count}, selection: {5 * count}, holdout: {10 * count}}}",
            f"n_samples: {count} is the search split, a small one: mergenetic estimates the score on all items from "
            f"it.  Take more; with fewer than {16 * count} items in a task make the other two smaller.",
        )


def relative_file(file: Path, draft: Draft) -> str:
    """A file that need not be there as the new file names it."""
    folder = relative(str(file.parent), draft.new)
    return file.name if folder == "." else f"{folder}/{file.name}"


def write_rest(top: dict[str, Any], tasks: int, draft: Draft) -> None:
    """Write goals, budget, seed, device and type."""
    if tasks > 1:
        draft.add("goals: pareto", "NSGA-II in mergenetic: the best models for other weights of the tasks too")
    size = draft.whole("pop_size", top.get("pop_size"))
    count = draft.whole("n_iter", top.get("n_iter"))
    if size and count:
        draft.add(
            f"budget: {{trials: {size * count}}}",
            f"n_iter {count} times pop_size {size}, baselines included; evomerge has no generations to set, unless "
            f"`sampler: {{name: cma-es, population: {max(4, size)}}}`",
        )
    seed = draft.whole("seed", top.get("seed", 420), 0)
    if seed is not None and seed >= 2**31:
        draft.add_problem("seed", f"{seed} is above {2**31 - 1}, the largest one")
    draft.add(f"seed: {seed}")
    device = draft.text("device", top["device"]) if top.get("device") is not None else None
    if device not in (None, "cuda"):
        draft.add(f"device: {plain(str(device))}")
    dtype = str(top.get("dtype", "bfloat16")).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        draft.add_problem("dtype", f"{short_repr(dtype)} is not one of float32, bfloat16, float16")
    draft.add(f"dtype: {dtype}")
