"""The published dense model of structured feed-forwards (arXiv 2406.16450), size s; a grid of sizes as overrides.

launch    torchrun --nproc_per_node=8 train.py experiments/structured/config/structured.py --lowdim.up=192
hardware  8 GPUs of 80 GB; any number that divides 512 sequences works
time      not measured
loss      published, RefinedWeb, nats per LLaMA token: dense 3.26, rank 384 3.30, rank 192 3.38; not measured here

The feed-forward at 63 % and at 32 %, with --lowdim.up and --lowdim.down alike; the first block's stays dense:

    size    --n_embd --n_layer --n_head    rank          blockshuffle:K    blockdense:R:K    --learning_rate --max_steps
    s       768      12        12          384    192    2    4            512:2     256:2   6e-4            4196
    m       1024     24        16          512    256    2    4            768:4     384:4   3e-4            12779
    l       1536     24        12          768    384    2    4            1024:2    512:2   2.5e-4          27847
    xl      2048     24        16          1024   512    2    4            1536:4    768:4   2e-4            48637

About 20 tokens per parameter: 2.2B, 6.7B, 14.6B, 25.5B; the corpus is to be prepared with as many --tokens. With other
steps set --warmup_steps to a tenth of them and --min_lr to a tenth of the rate. Not as published: o and down start
1 / sqrt(2 n_layer) smaller, factors decay by half of weight_decay, embeddings, norms and biases not at all.
"""

out_dir = "out/structured"
dataset = "webtext"  # python -m data.webtext.prepare --corpus=fineweb_edu --tokenizer=bpe:32000 --tokens=2.3e9

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
first_ffn_dense = True
norm = "layernorm"
norm_eps = 1e-5
mlp = "gelu"
pos = "rope"
bias = True
tie_embeddings = True

batch_size = 64
tokens_per_step = 512 * block_size  # 524,288
max_steps = 2_200_000_000 // tokens_per_step  # 4,196
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = max_steps // 10
weight_decay = 0.1
beta2 = 0.999
dtype = "bfloat16"
eval_tokens = 2_000_000
