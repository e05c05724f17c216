"""Run by mergekit's own Python: makes every merge that a JSON file lists, in one process (importing it takes seconds).

The list holds [configuration, output folder, seed]; a merge that fails leaves its error in `error.txt` there.
"""

import json
import sys
import traceback
from pathlib import Path

import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.scripts import multimerge

for config, out, seed in json.loads(Path(sys.argv[1]).read_text()):
    text = Path(config).read_text()
    try:
        if "\n---\n" in text:  # several documents
            arguments = [config, "--out-path", out, "-I", f"{out}.parts", "--random-seed", str(seed), "--quiet",
                         "--no-write-model-card", "--clone-tensors", "--lora-merge-cache", f"{out}.lora"]  # fmt: skip
            CliRunner().invoke(multimerge.main, arguments, catch_exceptions=False)
            continue
        options = MergeOptions(quiet=True, write_model_card=False, random_seed=seed, clone_tensors=True,
                               lora_merge_cache=f"{out}.lora")  # fmt: skip
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options, config_source=text)
    except Exception:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "error.txt").write_text(traceback.format_exc())
