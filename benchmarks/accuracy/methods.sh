#!/usr/bin/env bash
# The table of benchmarks/results/methods.md: every method on Omniglot, 5-way 1-shot, Conv4 with 64 filters.
#   bash benchmarks/accuracy/methods.sh DATA_ROOT [OUT] [METHODS] [JOBS]
# DATA_ROOT is Omniglot's folder or zip. It takes an hour and a quarter on two cores. A second start continues a stopped run.
# Methods with an inner loop are under norm="batch", as published figures are; the others under their own, "running".
# Metric and joint methods train on 20-way tasks, as ProtoNet's paper does; the test tasks are the same for all.
set -euo pipefail
data=${1:?usage: methods.sh DATA_ROOT [OUT] [METHODS] [JOBS]}
out=${2:-runs/methods}
methods=${3:-maml++,maml,fomaml,meta-sgd,anil,reptile,lstm,r2d2,metaoptnet,logistic,protonet,simpleshot,matchingnet,relationnet,siamese,mann,metanet,memorymodule,statistician,fine-tune,multi-task,zero-step}
jobs=${4:-2}

settings=(
  maml++.budget=5000 maml++.tasks_per_batch=2 maml++.msl_epochs=4
  maml++.execution.workers=2 maml++.execution.channels_last=true
  maml.budget=400 maml.meta_lr=0.002 maml.cosine_annealing=true maml.engine=functional
  fomaml.budget=1200 fomaml.meta_lr=0.002 fomaml.cosine_annealing=true fomaml.engine=functional
  meta-sgd.budget=3000 meta-sgd.meta_lr=0.003 meta-sgd.cosine_annealing=true meta-sgd.engine=functional
  anil.budget=3500 anil.tasks_per_batch=8 anil.meta_lr=0.002
  reptile.budget=800 reptile.epochs=5 reptile.tasks_per_batch=2 reptile.inner_steps=8 reptile.evaluation_steps=20
  reptile.inner_update.rule=adam reptile.inner_lr=0.003 'reptile.inner_update.betas=[0,0.999]'
  reptile.outputs.head_init=zeros
  reptile.engine=functional reptile.validation_tasks=40
  lstm.budget=500 lstm.epochs=5 lstm.tasks_per_batch=1 lstm.inner_steps=3 lstm.inner_lr=0.1 lstm.meta_lr=0.003
  lstm.engine=functional lstm.validation_tasks=40
  r2d2.train_ways=20 r2d2.tasks_per_batch=1 r2d2.meta_lr=0.003
  metaoptnet.budget=3000 metaoptnet.meta_lr=0.003
  protonet.budget=5000 protonet.train_ways=20 protonet.tasks_per_batch=1 protonet.meta_lr=0.003
  matchingnet.budget=5000 matchingnet.train_ways=20 matchingnet.tasks_per_batch=1 matchingnet.meta_lr=0.003
  matchingnet.scale=10
  relationnet.budget=5000 siamese.budget=3000 mann.budget=3000 metanet.budget=2000 memorymodule.budget=3500
  statistician.budget=3000 statistician.discriminative=10
  fine-tune.budget=1200 fine-tune.epochs=4 fine-tune.train_ways=20 fine-tune.meta_lr=0.003
  multi-task.budget=600 multi-task.epochs=4 multi-task.train_ways=20 multi-task.meta_lr=0.003
  zero-step.budget=200
)
for method in maml++ maml fomaml meta-sgd anil boil reptile lstm; do settings+=("$method.norm=batch"); done
sets=()
for setting in "${settings[@]}"; do
  # Only settings of the methods that are compared.
  if [[ ",$methods," == *",${setting%%.*},"* ]]; then sets+=(--set "$setting"); fi
done
exec "${PYTHON:-python}" -m metawrap compare --methods "$methods" --budget 4000 --jobs "$jobs" \
  --data omniglot --data-root "$data" --ways 5 --shots 1 --targets 1 --batch 4 --epochs 10 \
  --validation-tasks 200 --test-tasks 600 --out "$out" "${sets[@]}"
