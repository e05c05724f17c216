"""What a search has used, in words: for the terminal, report.html and the model card."""

from evomerge.report.progress import seconds_text
from evomerge.report.status import Status
from evomerge.search.budget.usage import Usage


def count_text(count: float) -> str:
    """A large number as text: 950, 12.3k, 4.5M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


def usage_text(used: Usage, price: tuple[float, str] | None = None) -> str:
    """One line: time, device time, tokens, memory; energy and price where they are known."""
    parts = [f"{seconds_text(used.seconds)} wall time, {seconds_text(used.device_seconds)} device time"]
    if used.device_seconds:
        parts[0] += f" ({min(1.0, used.worker_seconds / used.device_seconds):.0%} of it computing)"
    parts.append(f"{count_text(used.tokens)} tokens in {count_text(used.forwards)} forwards")
    if used.peak_bytes:
        parts.append(f"peak memory {count_text(used.peak_bytes)}B")
    if used.joules is not None:
        parts.append(f"{used.joules / 3.6e6:.3g} kWh")
    if price is not None:
        parts.append(f"{price[0]:.2f} {price[1]}")
    return ", ".join(parts)


def usage_section(status: Status) -> str:
    """A paragraph of Markdown on what the search has used; empty for old runs that did not count it."""
    if not status.used.seconds:
        return ""
    text = f"\nThe search ran {status.finished} trials and used: {usage_text(status.used, status.price)}.\n"
    if status.compute_dtype is not None:
        text += f"\nScores: weights in {status.config.dtype}, computed in {status.compute_dtype}.\n"
    return text
