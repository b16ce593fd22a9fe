# Natural images in one evaluation: the student of config/dkdm_cifar10_small.py's size.
# torchrun --nproc_per_node=2 few_steps.py config/few_steps_cifar10_small.py     # on a CPU, a rank per core
# two passes, and then four, each from the student before:
#   --jumps=2 --refine=True --seed=1 --init_from=out/few_steps_cifar10_small/student.safetensors \
#       --max_steps=2000 --out_dir=out/cifar10_two_steps
#   --jumps=4 --refine=True --seed=2 --init_from=out/cifar10_two_steps/student.safetensors \
#       --max_steps=1500 --out_dir=out/cifar10_four_steps
teacher = 'pretrained/cifar10_classes.safetensors'
guidance = 4.0
student_config = dict(model_channels=22, channel_mult=(1, 2, 2), attention_resolutions=(8, 4),
                      num_head_channels=44)
max_steps = 3200
lr = 2e-3
lr_warmup = 200
out_dir = 'out/few_steps_cifar10_small'
