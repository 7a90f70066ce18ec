#!/bin/bash
# sbatch recipes/clusters/slurm.sh math --output-dir /shared/runs/math
#
# Fill in: the lines #SBATCH (several machines: --nodes), and a folder that all machines share. Before the time is over, and
# when the job is preempted, Slurm sends SIGTERM: the step is finished and saved, and the job goes back into the queue, where
# the same command goes on. Not yet run on a cluster.
#SBATCH --job-name=lora-null
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
SHARED=${SHARED:-$PWD}

export HF_HOME=${HF_HOME:-$SHARED/huggingface} LORA_NULL_CACHE=${LORA_NULL_CACHE:-$SHARED/lora_null_cache}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=600 python -m lora_null.recipes.launch "$@"
status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
