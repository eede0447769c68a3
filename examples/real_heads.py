"""Writes a random model whose gated DeltaNet layers have Qwen3-Next's own head counts, small enough for a CPU.

    python examples/real_heads.py build/real-heads
    qwen-fastdecode compare build/real-heads --prompts examples/checkpoints/prompts.txt

Its states are as large as a real layer's (16 key heads, 32 value heads of 128, 2.1 MB a sequence in float32), which is
what a decode step costs; the hidden size and the number of layers are not. The tokenizer is a tiny checkpoint's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from qwen_fastdecode.cli.quiet import quiet_imports

TOKENIZER = Path(__file__).parent / "checkpoints" / "qwen3_next-tiny"
CONFIG = {
    "hidden_size": 256,
    "num_hidden_layers": 4,  # three linear, one full attention
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="FOLDER", type=Path, help="where the checkpoint goes")
    out = parser.parse_args().out
    quiet_imports()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    config = transformers.Qwen3NextConfig(**CONFIG, vocab_size=len(tokenizer), initializer_range=0.1)
    torch.manual_seed(0)
    model = transformers.Qwen3NextForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):  # upstream's constant forgets within a token or two
            torch.nn.init.uniform_(parameter, -6, 1)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
