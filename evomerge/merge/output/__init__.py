"""A merged model as a folder.

export.py       writes the folder: weights, configuration, tokenizer, chat template, card, recipe
load_check.py   checks before that transformers will load it
shards.py       the files of weights
model_card.py   README.md; licences.py: what the models' licences mean for it
compare.py      compares two folders byte by byte
"""
