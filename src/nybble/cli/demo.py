"""``nybble demo``: tells the demo's story in figures."""

from __future__ import annotations

from pathlib import Path

from nybble.cli.quantize import progress_display
from nybble.cli.tables import console, human_bytes, human_seconds, table
from nybble.demo import HELDOUT, NEW_TOKENS, RECIPE, DemoResult, run_demo
from nybble.recipe.load import load_recipe


def run(out: Path) -> None:
    """Runs the demo and prints what it measured."""
    console.print("Base: the bundled tiny model, a trained Qwen3.5-architecture checkpoint in BF16")
    console.print("with Gated DeltaNet and gated attention blocks, an MTP head and a vision tower.")
    console.print(f"Recipe: {RECIPE}: {load_recipe(RECIPE).summary()}\n")
    with progress_display() as on_event:
        result = run_demo(out, on_event)
    _print_cost(result)
    _print_measures(result)
    console.print("\nLines of held-out code, begun | completed by the INT4 model (greedy):")
    for start, completion in result.samples:
        console.print(f"  {start}|{completion}", soft_wrap=True)
    console.print(f"\nThe checkpoint is in {out}, its manifest in {out / 'nybble.json'}.")


def _print_cost(result: DemoResult) -> None:
    if result.already_finished:
        console.print(f"{result.out} already held this result: measured again, not made again.\n")
    else:
        console.print(
            f"Quantized in {human_seconds(result.quantize_seconds)}, peak memory "
            f"{human_bytes(result.peak_rss_bytes)}.\n"
        )


def _print_measures(result: DemoResult) -> None:
    kld, base, int4 = result.kld, result.base_acceptance, result.result_acceptance
    figures = table(["measured on held-out text"], ["BF16", "INT4"])
    figures.add_row("weights", human_bytes(result.base_bytes), human_bytes(result.result_bytes))
    figures.add_row("perplexity", f"{kld.base_perplexity:.3f}", f"{kld.candidate_perplexity:.3f}")
    figures.add_row("MTP drafts accepted", f"{base.rates[0]:.1%}", f"{int4.rates[0]:.1%}")
    console.print(figures)
    console.print(
        f"\nKL(BF16 || INT4): mean {kld.kld.mean:.5f} +- {kld.kld.standard_error:.5f} nats, median "
        f"{kld.quantiles['median']:.5f}, P99 {kld.quantiles['p99']:.4f}; same top token at "
        f"{kld.same_top.mean:.1%}"
    )
    console.print(
        f"({kld.positions:,} positions in {HELDOUT.rows} windows of {HELDOUT.seqlen} tokens; "
        f"acceptance: {HELDOUT.rows} greedy continuations of {NEW_TOKENS} tokens, "
        f"{int4.steps:,} drafts)"
    )
