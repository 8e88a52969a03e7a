"""LPA at 3B (table 10): 2.42B parameters where dense_3b has 3.23B.

launch    torchrun --nproc_per_node=8 train.py config/lpa_3b.py
hardware  8 GPUs of 80 GB
time      about 1,740 hours of one A100 at 40 % of its 312 TFLOP/s in bf16, by arithmetic; not measured here
loss      paper: test perplexity 6.11 (dense 6.45) per LLaMA-2 token, which is 1.81 nats; not measured here
"""

out_dir = "out/lpa_3b"
dataset = "webtext"  # python -m data.webtext.prepare --corpus=pile --tokenizer=bpe:32000 --tokens=51e9

n_layer = 16
n_head = 32
n_embd = 4096
ffn_dim = 14436
block_size = 4096
lowdim = dict(q=512, k=512, v=512, o=512)

# Norm-f-Add with LayerNorm, ReLU, biases; RoPE: the paper's counts fit a model without a position table
norm = "layernorm"
norm_eps = 1e-5
norm_order = "pre"
mlp = "relu"
pos = "rope"
bias = True

batch_size = 2
tokens_per_step = 64 * block_size  # 262,144
max_steps = 51_000_000_000 // tokens_per_step  # one pass over 51B tokens: 194,549
learning_rate = 6e-4
weight_decay = 0.0
eps = 1e-5
dtype = "bfloat16"
eval_interval = 1000
eval_tokens = 10_000_000
