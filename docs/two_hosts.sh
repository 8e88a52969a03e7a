#!/usr/bin/env bash
# Two hosts as two network namespaces, one of them cut off and brought back while train.py runs on both over gloo.
#
#     sudo docs/two_hosts.sh [DATASET [NODES]]   as root, with iproute2; 3 minutes; writes out/two_hosts
#
# 1. The link goes down for 10 s and comes back. 2. The link goes down, the host dies, comes back and joins again.
# 3. torchrun is started anew on both.
# docs/multi_node.md says what happened.
set -u
cd "$(dirname "$0")/.."
out=out/two_hosts
nodes=${2:-1:3}
mkdir -p $out
options="config/lpa_cpu.py --dataset=${1:-pystdlib} --device=cpu --dtype=float32 --n_layer=2 --n_embd=64 --n_head=2
  --ffn_dim=128 --lowdim.q=16 --lowdim.k=16 --lowdim.v=16 --lowdim.o=16 --batch_size=4 --max_steps=100000
  --save_interval=50 --log_interval=25 --eval_tokens=2560 --out_dir=$out/run --resume=auto"

hosts() { # make both, 10.77.0.1 and 10.77.0.2, joined by a cable named eth0 on either side
  ip netns add host_a && ip netns add host_b
  ip link add eth0 netns host_a type veth peer name eth0 netns host_b
  for host in a b; do
    ip -n host_$host addr add 10.77.0.$([ $host = a ] && echo 1 || echo 2)/24 dev eth0
    ip -n host_$host link set eth0 up
    ip -n host_$host link set lo up
  done
}

launch() { # launch a 1: torchrun on host a, 10.77.0.1, its workers included
  GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 ip netns exec host_$1 \
    ${TORCHRUN:-.venv/bin/torchrun} --nnodes=$nodes --nproc_per_node=1 --max-restarts=3 --rdzv-id=two --rdzv-backend=c10d \
    --rdzv-endpoint=10.77.0.1:29500 --local-addr=10.77.0.$2 \
    --rdzv-conf=last_call_timeout=5,is_host=$([ $1 = a ] && echo 1 || echo 0) train.py $options >>$out/$1.log 2>&1 &
  disown
}

tell() { echo "$(date +%T) $*; $(grep -h '^step' $out/?.log | tail -1 | cut -d'|' -f1,2)"; }

die() { ip netns pids host_$1 | xargs -r kill -9; } # all of a host: torchrun starts its workers in sessions of their own

finish() {
  for host in a b; do
    die $host
    ip netns del host_$host
  done
}

rm -rf $out/run $out/?.log
hosts
launch a 1
launch b 2
trap finish EXIT
for _ in $(seq 90); do grep -qs "^step 100/" $out/a.log $out/b.log && break; sleep 1; done
tell "both train"
ip -n host_b link set eth0 down
sleep 10
tell "1. cut off for 10 s"
ip -n host_b link set eth0 up
sleep 10
tell "   back for 10 s"
ip -n host_b link set eth0 down
die b
sleep "20"
tell "2. cut off and dead for 20 s"
ip -n host_b link set eth0 up
launch b 2
for i in 1 2 3 4 5 6; do sleep 5; tell "   joined anew $((5 * i)) s ago"; done
die a
die b
launch a 1
launch b 2
for i in 1 2 3 4 5 6 7 8; do sleep 5; tell "3. both started anew $((5 * i)) s ago"; done
grep -h "going on from\|Error:" $out/a.log | cut -c1-160
