"""The smallest run that shows what accumulation does: copy 8 tokens across 128 of noise, starting with 32 of noise.

launch    python -m experiments.recurrent.train experiments/recurrent/config/copy_small.py
          the same with --recurrent.alpha=0 --recurrent.alpha_learned=false            the control, which cannot
hardware  2 CPU cores
time      20 s of training on 1 thread of a shared machine
accuracy  3 seeds: every token, with all 128 of noise; the control 0.25 (results/recurrent_copy_small.md)
"""

out_dir = "out/copy_small"
dataset = "copy"
task = dict(keep=8, noise=128, start_noise=32, alphabet=10, rates="constant")

# One layer of 59,201 parameters, one of them alpha
model = "recurrent"
recurrent = dict(window=16, alpha=0.5)
n_layer = 1
n_head = 4
n_embd = 64
block_size = 128 + 2 * 8  # noise + 2 keep
vocab_size = 10
norm = "layernorm"
norm_eps = 1e-5
mlp = "relu"  # against vanishing gradients
pos = "learned"
tie_embeddings = True

batch_size = 64
max_steps = 300
learning_rate = 1e-3
schedule = "wsd"
decay_share = 1 / max_steps  # constant
beta2 = 0.999
grad_clip = 0.0
eval_interval = 50
log_interval = 50
save_interval = 100
