"""Answers to the lines of a file, in batches: `python examples/batch.py MODEL FILE`. On several GPUs, or to go on after
an interruption: accelerate_generate.py.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen_fastdecode

BATCH = 32
name, file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
qwen_fastdecode.patch(model, cuda_graph=True)  # on a CPU, or spread over GPUs, its steps stay eager

lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
lines.sort(key=len)  # sequences of a batch that are alike in length waste little
for start in range(0, len(lines), BATCH):
    inputs = tokenizer(lines[start : start + BATCH], return_tensors="pt", padding=True).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=128)
    print(*tokenizer.batch_decode(tokens, skip_special_tokens=True), sep="\n\n", end="\n\n")
print(qwen_fastdecode.status(model), file=sys.stderr)
