"""Load the exported model with transformers alone, and measure its loss on a text.

python load.py FOLDER TEXT_FILE
"""

import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main(folder: str, text: str) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if any(report.values()):
        sys.exit(f"error: the weights are not those of the class: {report}")
    assert "evomoe_plugin" not in sys.modules and "fairseq" not in sys.modules
    beginning = {"truncation": True, "max_length": model.config.max_position_embeddings}
    content = Path(text).read_text(encoding="utf-8")
    ids = tokenizer(content, return_tensors="pt", **beginning)["input_ids"]
    loss = model.eval()(ids, labels=ids).loss.item()
    experts = model.config.num_experts
    print(f"{type(model).__name__}, {experts} experts, perplexity {math.exp(loss):.1f} on {text}")
    prompt = tokenizer("def ", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
