# One evaluation: a student that makes a digit in one pass, where its guided teacher takes 32.
# python dkdm.py config/dkdm_mnist_one_step.py
# two passes: --jumps=2 --out_dir=out/mnist_two_steps, four: --jumps=4 --out_dir=out/mnist_four_steps
method = 'jumps'
student_prediction = 'x0'     # of 'v', some of the noise of x_t stays in the images of several jumps
jumps = 1
walks = 2048
walk_steps = 16
max_steps = 2000
batch_size = 64
out_dir = 'out/mnist_one_step'
