"""The models that a merge is made of: found, opened by memory map, checked against each other.

    locate.py               a path, a pattern or a hub id becomes a folder on this machine
    hub.py                  models of the hub: commits, headers before weights, downloads
    open_models.py          opens base and sources together
    checkpoint.py           one checkpoint: its configuration, its tensors, whether head and embedding are tied
    safetensors_files.py    the weight files of a folder and their headers
    adapter/                a LoRA adapter: the change that it makes to each tensor of the base
    quantised.py            quantised checkpoints, which are refused
    compatibility.py        whether models can be merged
    config_differences.py   configurations that make equal weights compute something else
    buffers.py              tensors that are not weights
    tokenizer.py            vocabularies; `tokenizer_union.py`: the union of several
    embedding_rows.py       embedding and head of models with different vocabularies, row by row
    tensor_names.py         a tensor's name becomes its layer and its component
    architecture.py         what transformers knows of a model without its weights
    transformers_load.py    whether transformers would find every tensor of a folder
    fingerprint.py          the SHA-256 of a model's files

In shapes, R is the rank of an adapter and V the number of rows of the output's embedding.
"""
