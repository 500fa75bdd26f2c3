"""Pretrain or adapt a RAT+ language model with Megatron. The program is rat_megatron/pretrain.py.

python pretrain_rat.py --rat-preset tiny --data-path DATA --save CHECKPOINTS
torchrun --nproc-per-node 8 pretrain_rat.py --rat-preset 1.5b --data-path DATA --save CHECKPOINTS --tensorboard-dir TB
"""

from rat_megatron.pretrain import main

if __name__ == "__main__":
    import torch

    main()
    torch.distributed.destroy_process_group()
