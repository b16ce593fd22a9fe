# Natural images in one evaluation: the student of config/dkdm_cifar10_small.py's size.
# torchrun --nproc_per_node=2 few_steps.py config/few_steps_cifar10_small.py     # on a CPU, a rank per core
# It continues on new walks, because it knows those of seed 0 by heart:
#   --seed=1 --max_steps=1750 --init_from=out/few_steps_cifar10_small/student.safetensors \
#       --out_dir=out/cifar10_small_1
# Then it trains against a discriminator on the walks of this second run:
#   --discriminator=0.5 --lr=1e-4 --lr_warmup=40 --seed=1 --max_steps=150 \
#       --init_from=out/cifar10_small_1/student.safetensors --out_dir=out/cifar10_small_2
teacher = 'pretrained/cifar10_classes.safetensors'
guidance = 4.0
student_config = dict(model_channels=22, channel_mult=(1, 2, 2), attention_resolutions=(8, 4),
                      num_head_channels=44)
walk_steps = 8
walk_sampler = 'dpm++'       # these three as in few_steps_cifar10.py
unguided_steps = 1
max_steps = 3200
lr = 2e-3
lr_warmup = 200
out_dir = 'out/few_steps_cifar10_small'
