"""A chat that prints each word as it comes: `python examples/chat.py MODEL`. An empty line or Ctrl-D ends it."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import qwen_fastdecode

name = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(name)
if tokenizer.chat_template is None:
    sys.exit(f"{name} has no chat template; batch.py takes plain prompts")
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
print(qwen_fastdecode.patch(model, cuda_graph=True))  # on a CPU, or spread over GPUs, its steps stay eager

streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
chat = []
while said := input("> ") if sys.stdin.isatty() else sys.stdin.readline().strip():
    chat.append({"role": "user", "content": said})
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs.to(model.device), max_new_tokens=512, streamer=streamer)
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    chat.append({"role": "assistant", "content": answer})
