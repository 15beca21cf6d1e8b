"""What the commands print: streamed text, an adapter's facts."""

from typing import Any

from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from pardec.adapters.adapter import MASK_EMBEDDINGS
from pardec.data.python_sources import VALIDATION, python_sources, stdlib_folder
from pardec.decoding.output import GenerationOutput, Origin, TextStream, pieces_of
from pardec.decoding.probing.probe_step import probe_step, text_of
from pardec.decoding.step import MODES
from pardec.measures.divergence import divergence_from
from pardec.measures.thorough import CONTEXTS, NEW_TOKENS, NUM_SAMPLED_TOKENS, check_thoroughly
from pardec.model import SelfSpeculativeModel
from pardec.output_console import OutputConsole
from pardec.run import dtype_name
from pardec.tuning.report import describe

# of tokens in a terminal, by where they came from
STYLES: dict[Origin, str] = {"target": "", "drafted": "green", "copied": "cyan"}


def as_object(prompt: str, out: GenerationOutput, mode: str) -> dict:
    """What `--json` prints of one prompt that was continued in this mode."""
    stats = out.stats.to_dict()
    stats.pop("sequences")
    stats["accepted_per_step"] = out.stats.sequences[0].accepted_per_step
    return {"prompt": prompt, "text": out.text[0], "token_ids": out.token_ids[0], "mode": mode, "stats": stats}


def options_of(number: int, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the prompt of that number from 0: seeds are counted up, else equal prompts would draw one text."""
    seed = options["seed"]
    return options if seed is None else {**options, "seed": (seed + number) % 2**63}


def print_stream(
    model: SelfSpeculativeModel, prompt: str | list[int], mode: str, options: dict, show_drafts: bool
) -> None:
    """Prints text as it becomes final; accepted drafts and copies in colour where asked for."""
    chunks = model.stream(prompt, mode=mode, **options)
    if not show_drafts:
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
        print(flush=True)  # what stands on standard error behind it comes after it
        return
    console = OutputConsole(highlight=False, soft_wrap=True, force_terminal=True)
    text, accepted, copied, steps, emitted = TextStream(model.tokenizer), 0, 0, 0, 0
    for number, chunk in enumerate(chunks):
        for piece, origin in pieces_of(text, chunk, mode, is_first=number == 0):
            style = STYLES[origin]
            console.print(Text(piece, style=f"bold {style}" if style else ""), end="")
        accepted, steps = accepted + chunk.num_accepted_tokens, steps + (number > 0)
        copied += chunk.num_copied_tokens
        emitted += len(chunk.token_ids) if number else 0  # prefill's token aside
    console.print(Text(text.put([], last=True)), end="")
    if mode == "plain":
        console.print("\n\ndecoded plain, a token a step: nothing was drafted", style="dim")
        return
    rate = f", {emitted / steps:.2f} tokens a step" if steps else ""
    colours = f"green; {copied} copied tokens besides, cyan" if copied else "green"
    console.print(f"\n\n{accepted} drafted tokens accepted in {steps} steps ({colours}){rate}", style="dim")


def tie_of(model: SelfSpeculativeModel, prompt: str | list[int], found: list[int], plain: list[int]) -> str | None:
    """The first difference in words, if it is a tie that the dtype's rounding decides; None if it is not."""
    ids = model.prompt_ids(prompt)[0]
    divergence = divergence_from(model.base_model, "", ids, found, plain)
    if divergence is None or not divergence.explained:
        return None
    return f"a tie of {dtype_name(model.target.dtype)} at token {divergence.index}"


def print_thorough_check(model: SelfSpeculativeModel) -> bool:
    """The long check, in a table; whether everything was as it must be."""
    sources = python_sources(stdlib_folder(), VALIDATION)
    text = text_of(model.target, 4096).tolist()
    if model.tokenizer is not None:
        text = model.tokenizer(next(sources), verbose=False).input_ids
    with tqdm(total=1 + len(CONTEXTS) + len(MODES), unit="part", leave=False) as bar:

        def begin(part: str) -> None:
            bar.update(bool(bar.desc))
            bar.set_description(part)

        report = check_thoroughly(model, text, begin)
    table = Table("what", "where", "found", "")
    for length, deviation in report.lengths.deviations.items():
        table.add_row("real rows", f"behind {length} tokens", f"{deviation:.1e} standard deviations", "ok")
    for length in report.lengths.skipped:
        table.add_row("real rows", f"behind {length} tokens", "no memory, or no positions", "not checked")
    for greedy in report.greedy:
        found = f"first difference at token {greedy.divergence.index}" if greedy.divergence else "generate's tokens"
        verdict = "DIFFERENT" if not greedy.passed else "a tie" if greedy.divergence else "ok"
        table.add_row(f"{NEW_TOKENS} greedy tokens, {greedy.mode}", f"behind {greedy.context} tokens", found, verdict)
    for law in report.law:
        found = f"p = {law.p_value:.3g} of {law.num_cells} cells"
        verdict = "ok" if law.passed else "ANOTHER LAW"
        table.add_row(f"{law.num_samples:,} samples, {law.mode}", f"{NUM_SAMPLED_TOKENS} tokens", found, verdict)
    OutputConsole(highlight=False).print(table)
    return report.passed


def print_check(model: SelfSpeculativeModel) -> bool:
    """The adapter's facts, the probe's figure and a short comparison of every mode with plain decoding."""
    assert model.adapter is not None
    metadata, lora = model.adapter.metadata, model.adapter.lora
    table = Table(show_header=False)
    table.add_row("base", f"{metadata.base.name} (fingerprint matches)")
    if metadata.draft_input == MASK_EMBEDDINGS:
        table.add_row("mask tokens", f"{metadata.num_speculative_tokens}, {metadata.mask_sharing}")
    else:
        table.add_row("random tokens at draft rows", f"{metadata.num_speculative_tokens}")
    table.add_row("gated LoRA", "none" if lora is None else f"rank {lora.rank}, {len(lora.pairs())} modules")
    head = metadata.head
    table.add_row("sampler head", "none" if head is None else f"width {head.width}, shortlist {head.shortlist}")
    sampled = metadata.measured.get("sampled")
    if isinstance(sampled, dict):
        shown = ("mean_acceptance_length", "interval", "temperature", "top_k")
        table.add_row("measured when trained", ", ".join(f"{key} {sampled.get(key)}" for key in shown))
    if model.tuned is not None:
        chosen = describe(model.tuned, has_head=head is not None)
        table.add_row("tuned", f"{chosen} on {model.tuned.device}, {model.tuned.dtype}")
    deviation = probe_step(model.target)
    table.add_row("real rows against a plain forward", f"{deviation:.1e} standard deviations of the logits")
    limit = model.target.max_positions or 2**16
    prompt = text_of(model.target, min(12, limit // 2)).tolist()
    num_tokens = min(32, limit - len(prompt))
    plain = model.generate([prompt], mode="plain", max_new_tokens=num_tokens).token_ids
    identical = True
    for mode in ("two_pass", "fused"):
        found = model.generate([prompt], mode=mode, max_new_tokens=num_tokens).token_ids
        tie = None if found == plain else tie_of(model, prompt, found[0], plain[0])
        same = "identical to plain" if found == plain else "DIFFERENT from plain"
        table.add_row(f"{num_tokens} greedy tokens, {mode}", same if tie is None else f"identical to plain up to {tie}")
        identical = identical and (found == plain or tie is not None)
    OutputConsole(highlight=False).print(table)
    return identical
