"""Talk to a trained adapter in the terminal, with the chat template that is saved beside it (`make chat`).

finlora chat --recipe sentiment_r8_dora [--tiny] [--keep-quantised]

The merged model where there is one, else the adapter merged in memory, or with --keep-quantised on quantised weights
with DoRA's norms cached. `axolotl inference --chat` takes the template from the recipe instead of the adapter's folder,
samples, penalises what is repeated, and refuses a pipe; `transformers chat` samples and wants a server.
"""

import sys
from contextlib import suppress
from typing import Any

from finlora.core.paths import shown
from finlora.export.merge import as_trained
from finlora.export.subject import fetch_model, merged_folder, without_the_hub


def load(plan: dict[str, Any], prompt: str, keep_quantised: bool):
    """(model, tokenizer, what they are, in words)."""
    from finlora.models import load as models

    folder = None if keep_quantised or prompt != "saved" else merged_folder(plan)
    if folder:
        without_the_hub()
        return models.load_base(str(folder), 16), models.load_tokenizer(str(folder), None, prompt), shown(str(folder))
    fetch_model(plan)
    tokenizer = models.load_tokenizer(plan["model"], plan["adapter"], prompt)
    models.check_fits(plan["adapter"], plan["model"])
    quantised = keep_quantised and plan["bits"] != 16
    model = (
        as_trained(plan) if quantised else models.attach(models.load_base(plan["model"], plan["bits"]), plan["adapter"])
    )
    way = "not merged" if quantised else "merged in memory"
    return model, tokenizer, f"{shown(str(plan['adapter']))}, {way}, on {plan['bits']}-bit {shown(plan['model'])}"


def chat(model, tokenizer, most: int) -> None:
    """Answer lines from the terminal or a pipe, greedily and as they come, until Ctrl-D, Ctrl-C or the end."""
    from transformers import TextStreamer

    from finlora.models.generate import end_tokens

    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 (line editing)
        print("/new forgets what was said; Ctrl-C ends an answer; Ctrl-D leaves")
    turns: list[dict[str, str]] = []
    while True:
        try:
            text = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/new":
            turns = []
        if not text or text == "/new":
            continue
        turns.append({"role": "user", "content": text})
        given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        given, length = given.to(model.device), given["input_ids"].shape[1]
        if length + most > model.config.max_position_embeddings:
            print("that is more than the model can take; /new begins anew", file=sys.stderr)
            turns.pop()
            continue
        try:
            out = model.generate(
                **given,
                max_new_tokens=most,
                do_sample=False,
                temperature=None,
                top_p=None,
                eos_token_id=end_tokens(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        except KeyboardInterrupt:
            print()
            turns.pop()
            continue
        turns.append({"role": "assistant", "content": tokenizer.decode(out[0, length:], skip_special_tokens=True)})


def run(plan: dict[str, Any], prompt: str, keep_quantised: bool, most: int) -> None:
    """Load the model, say what it is, and chat."""
    model, tokenizer, what = load(plan, prompt, keep_quantised)
    print(f"chatting with {plan['name']}: {what}", file=sys.stderr, flush=True)
    chat(model, tokenizer, most)
