# The bundled MNIST denoiser, pretrained/mnist_unet.safetensors:
# python dkdm.py config/mnist_teacher.py --data=mnist
method = 'data'
data = 'mnist'
student_prediction = 'v'
student_config = dict(patch_size=2, model_channels=32, num_res_blocks=2, channel_mult=(1, 2),
                      attention_resolutions=(7,), num_head_channels=32)
max_steps = 8000
batch_size = 128
lr = 1.5e-3
lr_warmup = 200
ema = 0.9995
save_every = 500
dtype = 'bfloat16'
out_dir = 'out/mnist_teacher'
