"""Run by mergekit's own Python: writes mergekit-evolve's merge of each genome and genotype in a JSON file."""

import json
import sys
from pathlib import Path

import torch
from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition

for definition, genotype, out in json.loads(Path(sys.argv[1]).read_text()):
    genome = ModelGenome(ModelGenomeDefinition.model_validate(definition))
    Path(out).write_text(genome.genotype_merge_config(torch.tensor(genotype)).to_yaml())
