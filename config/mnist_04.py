# A prior that knows less than the classifier: the digits 0 to 4 only. In half precision it is
# pretrained/mnist_04.safetensors.
# python dkdm.py config/mnist_04.py
method = 'data'
data = 'mnist:0-4'
student_prediction = 'v'
student_config = dict(patch_size=2, model_channels=32, num_res_blocks=2, channel_mult=(1, 2),
                      attention_resolutions=(7,), num_head_channels=32)
max_steps = 900
batch_size = 64
lr = 1.5e-3
lr_warmup = 200
ema = 0.9995
save_every = 900
dtype = 'bfloat16'
out_dir = 'out/mnist_04'
