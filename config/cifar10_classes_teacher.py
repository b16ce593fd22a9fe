# The bundled CIFAR-10 denoiser with classes, pretrained/cifar10_classes.safetensors, 2.23 M
# parameters: 4.3 million images in three runs (pretrained/README.md). One core of an AMD EPYC (Zen 4)
# does about 100 images per second; an NVIDIA H200 30,900, with --batch_size=2048.
# python dkdm.py config/cifar10_classes_teacher.py
method = 'data'
data = 'cifar10'
class_cond = True
uncond_prob = 0.1
flip = True
student_config = dict(patch_size=2, model_channels=40, num_res_blocks=1, channel_mult=(1, 2, 2),
                      attention_resolutions=(8, 4), num_head_channels=40)
max_steps = 100000
batch_size = 64
lr = 1.5e-3
lr_warmup = 200
lr_decay = False
ema = 0.9995
log_every = 100
out_dir = 'out/cifar10_classes_teacher'
