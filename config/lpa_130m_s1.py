"""LPA at 130M, the paper's setting 1 (table 9): 125M parameters where dense_130m_s1 has 135M.

launch    torchrun --nproc_per_node=8 train.py config/lpa_130m_s1.py
hardware  8 GPUs of 24 GB or more; any number that divides 160 sequences works, accumulation follows
time      about 22 hours of one A100 at 40 % of its 19.5 TFLOP/s in fp32, by arithmetic; not measured here
loss      paper: test perplexity 14.66 (dense 14.61) per LLaMA-2 token, which is 2.69 nats; not measured here
"""

out_dir = "out/lpa_130m_s1"
dataset = "wikitext103"  # python -m data.wikitext103.prepare

n_layer = 12
n_head = 8
n_embd = 768
ffn_dim = 3072
block_size = 512
lowdim = dict(q=256, k=256, v=256, o=256)

# Setting 1: f-Norm-Add with LayerNorm, ReLU, learned positions, biases everywhere
norm = "layernorm"
norm_eps = 1e-5
norm_order = "post"
mlp = "relu"
pos = "learned"
bias = True
head_bias = True
dropout = 0.1

batch_size = 20
tokens_per_step = 160 * block_size  # 81,920
max_steps = 10 * 100_000_000 // tokens_per_step  # 10 epochs of 0.1B tokens: 12,207
learning_rate = 8e-4
warmup_steps = 1000
weight_decay = 0.0
eps = 1e-5
dtype = "float32"  # as the authors; --dtype=bfloat16 is several times faster on a GPU
