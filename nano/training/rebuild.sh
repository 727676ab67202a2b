#!/usr/bin/env bash
# Train nano's weights again from nothing:  nano/training/rebuild.sh [vae text unet judge encoder hypernet e4t]
#
# All of them if none is named, in this order, as each needs those before it (the judge none). What is stopped
# resumes where it was when it is called again; to begin anew, remove runs/. The minutes are for two cores,
# extrapolated from the processor time of a few steps, not run. The reader of photos, which needs none of them,
# learns from a folder of labelled portraits:  python -m nano.photo.train --photos FOLDER
set -euo pipefail
cd "$(dirname "$0")/../.."

rebuild() {
    case $1 in
        vae)  # 120 minutes
            python -m nano.training.pretrain vae --bf16 --steps 12100 --batch 8 --lr 2e-3
            python -m nano.training.pretrain vae --bf16 --steps 900 --batch 8 --lr 1e-3 --decoder ;;
        text)  # 1 minute
            python -m nano.training.pretrain text --steps 700 --batch 64 --lr 1e-3 ;;
        unet)  # 200 minutes
            python -m nano.training.pretrain unet --steps 24300 --batch 16 --lr 1e-3 --ema .998 --fresh 6 ;;
        judge)  # 5 minutes
            python -m nano.judge --people 5000 --steps 1000 ;;
        encoder)  # 60 minutes
            python -m nano.training.pretrain encoder --steps 6700 --batch 64 --lr 1.5e-3 ;;
        hypernet)  # 230 minutes
            python train.py --steps 8300 --batch 24 --lr 6e-4 --save nano/hypernet.safetensors ;;
        e4t)  # 50 minutes
            python -m methods.train_e4t --steps 3000 --batch 16 --lr 3e-3 --save nano/e4t.safetensors ;;
        *)
            echo "rebuild.sh: no part $1; there are vae text unet judge encoder hypernet e4t" >&2
            exit 2 ;;
    esac
}

[ $# -gt 0 ] || set -- vae text unet judge encoder hypernet e4t
for part; do
    rebuild "$part"
done
