# Natural images: the bundled CIFAR-10 denoiser teaches a U-Net of less than a third of its
# parameters.
# python dkdm.py config/dkdm_cifar10_small.py
teacher = 'pretrained/cifar10_classes.safetensors'
guidance = 4.0               # at 4 most of its images show their class (docs/results.md)
student_config = dict(model_channels=22, channel_mult=(1, 2, 2), attention_resolutions=(8, 4),
                      num_head_channels=44)
max_steps = 3500
lr = 2e-3
lr_warmup = 200
out_dir = 'out/dkdm_cifar10_small'
