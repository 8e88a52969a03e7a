"""The paper's copy task: 16 tokens across 4,096 of noise, with one layer of 508,705 parameters (arXiv 2402.14746).

launch    python -m experiments.recurrent.train experiments/recurrent/config/copy.py --compile=block
          the same with --max_steps=900                            on a CPU, in hours
          the same with --task.noise=512 --block_size=544          on a CPU, in minutes
hardware  a GPU, not tried: a sequence is 129 steps of one layer, one after the other
time      95 minutes for 900 steps, on 1 thread of a shared machine; published: 900 steps of 64 sequences
accuracy  one seed: every token with all 4,096 of noise, from step 500 on; published: every token
"""

out_dir = "out/copy"
dataset = "copy"
task = dict(keep=16, noise=4096, start_noise=32, alphabet=16, threshold=0.3, rates="note")

model = "recurrent"
recurrent = dict(window=32, alpha=0.5)
n_layer = 1
n_head = 6
n_embd = 96
block_size = 4096 + 2 * 16  # noise + 2 keep
vocab_size = 16
norm = "layernorm"
norm_eps = 1e-5
mlp = "relu"
pos = "learned"
tie_embeddings = True
dropout = 0.05

batch_size = 64
max_steps = 2000
learning_rate = 5e-4
schedule = "wsd"
decay_share = 1 / max_steps  # constant, times the factor of the stage
beta2 = 0.999
grad_clip = 0.0
eval_interval = 50
log_interval = 50
save_interval = 500
