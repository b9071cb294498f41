#!/bin/bash
# Train on several nodes of a Slurm cluster, in as many jobs as it takes. From the repository's
# root, with the environment that has PyTorch active:
#
#     sbatch examples/slurm.sh config/train_gpt2.py --out_dir=out-gpt2
#
# A job that nears its time limit saves its state and queues itself again. The next one resumes from
# there. A process that dies is restarted within the job. All nodes must see the same out_dir and
# data/.
#
# This has run on one machine, with stand-ins for srun and scontrol (tests/test_slurm.py) and
# PyTorch 2.13. It has not run on a cluster yet.
#
#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1       # one torchrun, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0                   # all of a node's memory
#SBATCH --exclusive               # and nobody else on it
#SBATCH --time=24:00:00
#SBATCH --requeue                 # also when a node fails
#SBATCH --open-mode=append        # all jobs write to one log
#SBATCH --signal=B:USR1@300       # 300 s before the limit, to this shell alone

# The environment, unless sbatch is to take yours:
# . /path/to/venv/bin/activate    # or module load ...

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))          # two jobs on a node need two
# a store for each restart: a shared one would keep the addresses of processes that have died
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun would kill a process that is still saving after 30 s
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# less of a GPU's memory is lost in fragments
export PYTORCH_ALLOC_CONF=expandable_segments:True

# In the background: bash runs a trap when `wait` is interrupted, but not before a command ends.
# No kill on bad exit: a node that has stopped must not end the one that is still saving.
# A job that was queued again resumes. The first one starts as the config says.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
    train.py "$@" --auto_resume=True &
srun=$!

# srun passes SIGUSR1 on to all nodes; SIGTERM would make it kill them
trap 'stopping=yes; kill -USR1 $srun' USR1
while kill -0 $srun 2>/dev/null; do wait $srun; done    # each signal interrupts a wait
wait $srun
status=$?
# 0: the run was done anyway. torchrun returns 1 after a stop
if [ "${stopping:-}" ] && [ $status != 0 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
