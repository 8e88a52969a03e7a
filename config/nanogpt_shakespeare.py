"""What others do on a laptop: nanoGPT's published CPU settings for Shakespeare by characters, in this trainer.

launch    python train.py config/nanogpt_shakespeare.py
hardware  2 CPU cores
time      60 s of training
loss      1.905, the best of each run, the median of three seeds (results/time_to_loss_shakespeare_char.md)
"""

out_dir = "out/nanogpt_shakespeare"
dataset = "shakespeare_char"  # python -m data.shakespeare_char.prepare

# GPT-2's block without biases
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
vocab_size = 65
norm = "layernorm"
norm_eps = 1e-5
mlp = "gelu"
pos = "learned"
tie_embeddings = True

batch_size = 12
max_steps = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 100
weight_decay = 0.1
beta2 = 0.99
eval_interval = 50
save_interval = max_steps
log_interval = 50
