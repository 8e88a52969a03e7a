"""Shakespeare by characters with one recurrent layer that forgets: the paper's language task (arXiv 2402.14746).

launch    python -m experiments.recurrent.train experiments/recurrent/config/recurrent_shakespeare.py
hardware  a GPU
time      not run at this size
loss      not run at this size. Half as wide, 1,500 steps of 16 sequences: 1.665; one plain layer 1.831, six 1.650
          (results/recurrent.md). Published, with chunks of one character: 1.4738, and 1.5697 for one plain layer
"""

out_dir = "out/recurrent_shakespeare"
dataset = "shakespeare_char"  # python -m data.shakespeare_char.prepare

model = "recurrent"
recurrent = dict(window=16, alpha=0.0, alpha_learned=False)  # as published: accumulation does not help on language
n_layer = 1
n_head = 6
n_embd = 384
block_size = 256
vocab_size = 65
norm = "layernorm"
norm_eps = 1e-5
mlp = "gelu"
pos = "learned"
tie_embeddings = True
dropout = 0.2

batch_size = 64
max_steps = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 100
weight_decay = 0.1
beta2 = 0.99
eval_interval = 250
