"""The bank: the tensors of the base and the sources by the names of what they are merged into, on one device.

    bank.py               `Bank` joins the parts below
    device_cache.py       tensors on the device: those that stay, and those in use now
    transfer.py           copies from the host to the device that run beside the work there
    prefetch.py           which copies were begun for which output tensor
    derived_tensors.py    the matrices of `tsv`, `iso_c` and `regmean`, computed once
    statistics_files.py   the sources' statistics files, opened once
    tensor_inputs.py      what one output tensor is merged of, kept from candidate to candidate
    memory.py             how many bytes may be used, on the device and on the host

Letters of shapes: N sources, E elements.
"""
