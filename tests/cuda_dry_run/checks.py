"""What must hold of every case, as a list of what does not."""

from __future__ import annotations

from typing import Any

LOWEST, HIGHEST = 0.97, 1.15
"""The estimate of memory over what was counted: hardly ever too little, and not so much that a faster way is missed."""

_TRANSFORMERS_ASKS = "transformers/masking_utils.py"
"""Once a forward of padded rows transformers reads a number back, to see whether a row holds several texts."""


def faults(outcome: dict[str, Any]) -> list[str]:
    """What is wrong with a training step."""
    found = [] if outcome["error"] is None else [outcome["error"]]
    read = {place: times for place, times in outcome["read_backs"].items() if _TRANSFORMERS_ASKS not in place}
    for what, places in (
        ("read back from the device", read),
        ("copied to the device while the host waits", outcome["blocking_copies"]),
        ("left on the host", outcome["strays"]),
    ):
        found += [f"{what}: {place}, {times} times" for place, times in places.items()]
    found += [f"wrong gradient: {name}" for name in outcome["wrong_gradients"][:3]]
    if outcome["estimated_bytes"] is not None and outcome["error"] is None:
        counted = outcome["peak_bytes"] - outcome["base_bytes"]
        share = outcome["estimated_bytes"] / counted
        if not LOWEST <= share <= HIGHEST:
            found.append(f"memory estimate: {share:.3f} of the {counted / 2**30:.2f} GiB that were counted")
    return found
