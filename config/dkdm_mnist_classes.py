# Classes: the student learns the teacher's guided prediction, and its prediction without a class.
teacher = 'out/mnist_classes_teacher/student.safetensors'
teacher_source = 'it by python dkdm.py config/mnist_classes_teacher.py --data=mnist'
guidance = 2.0
uncond_prob = 0.1
max_steps = 3000
out_dir = 'out/dkdm_mnist_classes'
