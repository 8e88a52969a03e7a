"""A plain GPT-2 small with nanoGPT's published hyperparameters.

launch    python train.py config/nanogpt_124m.py
hardware  one GPU of 80 GB
time      not measured
loss      not measured; nanoGPT's own 600,000 steps on OpenWebText end at 2.85 nats a token, it says
"""

out_dir = "out/nanogpt_124m"
dataset = "gutenberg"  # python -m data.own_text.prepare --path=BOOKS --name=gutenberg --tokenizer=gpt2

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
norm = "layernorm"
norm_eps = 1e-5
mlp = "gelu"
pos = "learned"
tie_embeddings = True

batch_size = 48
tokens_per_step = 480 * block_size  # 491,520
max_steps = 500  # for a corpus of 52M tokens; published: 600,000
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 50  # published: 2000 of 600,000
weight_decay = 0.1
dtype = "bfloat16"
eval_interval = 20
save_interval = max_steps
