"""Make a tiny Qwen2 with a tokenizer of its own, in place of a downloaded model.

python make_qwen2.py OUT TEXT_FOLDER
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY, LENGTH, BATCH, STEPS = 1024, 128, 16, 150
END = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=[END, "<unk>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>", pad_token="<pad>"
    )


def train_model(ids: torch.Tensor) -> Qwen2ForCausalLM:
    """A few steps, so that there is something to start from."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"a Qwen2 of {model.num_parameters():,} parameters; loss {loss.item():.2f}")
    return model.eval()


def main(out: str, folder: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).rglob("*.py"))]
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(out)
    ids = [token for text in texts for token in (*tokenizer(text)["input_ids"], 0)]
    train_model(torch.tensor(ids)).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
