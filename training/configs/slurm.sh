#!/bin/bash
# Two machines with eight GPUs each under Slurm: sbatch training/configs/slurm.sh --config training/recipes/prosparse.yaml --output-dir …
# The same job may be requeued: it saves at SIGTERM and goes on where it was. output_dir lies on a shared file system.
#SBATCH --job-name=hf-sparse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
set -euo pipefail

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD

srun --kill-on-bad-exit=0 bash -c 'exec accelerate launch \
    --config_file training/configs/two_machines.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((8 * SLURM_NNODES))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port 29500 \
    training/finetune.py --precision bf16 --data-streams "$((8 * SLURM_NNODES))" --resume "$@"' _ "$@"
