"""The bank: the same bits whatever it may hold, and no more memory than it says."""

import torch
from merge import SOURCES, write_models

from evomerge.merge.bank.bank import Bank
from evomerge.merge.materialise import materialise
from evomerge.sources.open_models import open_models
from gpu_steps.bench import Bench
from gpu_steps.models import outputs, shapes, write_adapter, zero_weight

METHODS = ["task_arithmetic", "ties", "della"]


def capacities(bench: Bench) -> None:
    """A source of weight 0, an adapter, and capacities from nothing to all; bits against the CPU's."""
    size = "tiny" if bench.small else "135m"
    folders = write_models(bench.work / "bank", size)
    folders["adapter"] = write_adapter(bench.work / "bank" / "adapter", folders["base"], shapes(size))
    models = open_models(folders["base"], {n: folders[n] for n in (*SOURCES, "adapter")})
    whole = 6 * sum(t.bytes for t in models.base.tensors.values())
    compiled = bench.compiled()
    for method in METHODS[1:] if bench.small else METHODS:
        made = zero_weight(method, folders, "bfloat16")
        host = Bank(models, "cpu")
        wanted = outputs(host, torch.bfloat16)
        materialise(made, host, wanted)
        for capacity in (0, whole // 5, 2 * whole):
            with bench.guarded(f"{method} within {capacity / 1e6:.0f} MB"):
                bench.reset_peak()
                before = bench.peak()
                bank = Bank(models, bench.device, capacity, compiled, mapped=False)
                found = outputs(bank, torch.bfloat16)
                own = sum(x.nbytes for x in found.values())
                same = True
                for _ in range(2):
                    materialise(made, bank, found)
                    same = same and all(torch.equal(found[n].cpu(), wanted[n]) for n in wanted)
                assert bank.transfers is not None
                held = sum(x.nbytes for x in bank.tensors.held.values())
                beyond = bench.peak() - before - own - held
                room = bank.transfers.window + (1 << 30)
                fits = held <= capacity and bank.room.taken <= capacity and beyond <= room
                text = f"holds {held / 1e6:.0f}, beyond it {beyond / 1e6:.0f} of {room / 1e6:.0f}"
                bench.report(f"{method} within {capacity / 1e6:.0f} MB: the CPU's bits; MB", text, ok=same and fits)
                left = len(bank.transfers.coming)
                bench.report(f"{method}: sent and never used", left, ok=left == 0)
                del bank, found
