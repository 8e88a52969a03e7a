"""LPA at 130M, the paper's setting 2 (table 9): 115M parameters where dense_130m has 134M.

launch    torchrun --nproc_per_node=8 train.py config/lpa_130m.py
hardware  8 GPUs of 24 GB or more; any number that divides 320 sequences works, accumulation follows
time      about 3 hours of one A100 at 40 % of its 312 TFLOP/s in bf16, by arithmetic; not measured here
loss      paper: test perplexity 18.95 (dense 18.84) per LLaMA-2 token, which is 2.94 nats; not measured here
"""

out_dir = "out/lpa_130m"
dataset = "webtext"  # python -m data.webtext.prepare --corpus=pile --tokenizer=bpe:32000 --tokens=2.6e9

n_layer = 12
n_head = 12
n_embd = 768
ffn_dim = 2048
block_size = 256
lowdim = dict(q=128, k=128, v=128, o=128)

# Setting 2: Norm-f-Add with RMSNorm, SwiGLU, RoPE, no biases
norm = "rmsnorm"
norm_eps = 1e-6
norm_order = "pre"
mlp = "swiglu"
pos = "rope"

batch_size = 40
tokens_per_step = 320 * block_size  # 81,920
max_steps = 2_600_000_000 // tokens_per_step  # one pass over 2.6B tokens: 31,738
learning_rate = 1e-3
weight_decay = 0.0
eps = 1e-5
dtype = "bfloat16"
eval_tokens = 2_000_000
