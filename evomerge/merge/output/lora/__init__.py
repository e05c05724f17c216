"""A merge written as a LoRA adapter of its base.

write.py    `write_lora`: every tensor of a recipe, and the folder that PEFT opens
factors.py  the factors of one tensor's change: concatenated, or by truncated singular value decomposition
places.py   which module of the model in memory holds a tensor, and how PEFT stores factors for it
"""
