# Classes: the student learns the teacher's guided prediction, and its prediction without a class.
# python dkdm.py config/dkdm_mnist_classes.py
teacher = 'pretrained/mnist_classes.safetensors'
guidance = 2.0
uncond_prob = 0.1
student_config = dict(model_channels=32)
max_steps = 3000
out_dir = 'out/dkdm_mnist_classes'
