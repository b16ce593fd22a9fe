# The bundled class-conditional denoiser, pretrained/mnist_classes.safetensors:
# python dkdm.py config/mnist_classes_teacher.py --data=mnist
method = 'data'
data = 'mnist'
class_cond = True
uncond_prob = 0.1
student_config = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1)
max_steps = 5000
batch_size = 64
lr = 1.5e-3
lr_warmup = 200
save_every = 1000
out_dir = 'out/mnist_classes_teacher'
