"""Tables after a run."""

from __future__ import annotations


def perplexity_table(*, model: str, dense: float | None, final: float, sparsity: float, protocol: str) -> str:
    """Return the closing table of a run: perplexity before and after.

    Args:
        model: What was trained.
        dense: Perplexity before the first step; None when it was not measured.
        final: Perplexity after the last step.
        sparsity: Zeros over elements of the linear layers' weights, after the last step.
        protocol: Text, segments, length and precision of the measurement.
    """
    rows = [("dense", "0.00 %", dense)] if dense is not None else []
    rows.append(("final", f"{sparsity:.2%}".replace("%", " %"), final))
    lines = [f"{model}: perplexity on {protocol}", f"  {'':10}{'sparsity':>10}{'perplexity':>14}"]
    lines += [f"  {name:10}{zeros:>10}{value:>14.3f}" for name, zeros, value in rows if value is not None]
    if dense is not None:
        lines.append(f"  dense → {final / dense:.2f}× perplexity")
    return "\n".join(lines)
