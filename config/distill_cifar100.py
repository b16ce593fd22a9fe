# CIFAR-100, ResNet-34 to ResNet-18 (Table I). The images and the student:
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_cifar100/student.safetensors --out_dir=out/synth_cifar100
# python distill_classifier.py config/distill_cifar100.py
# VGG-11 to ResNet-18, on the images of that teacher (config/synth_sd15.py has the command):
# python distill_classifier.py config/distill_cifar100.py --teacher=out/teacher_cifar100_vgg11/student.safetensors --data=out/synth_cifar100_vgg11 --out_dir=out/cifar100_vgg11
# The losses are the paper's. The temperature, SGD's learning rate and weight decay, the batch size
# and 240 epochs of a cosine with warm-up are those of the authors' option files. The length of the
# warm-up is ours, and the weights of the losses are SpaceshipNet's.
data = 'out/synth_cifar100'
test = 'cifar100'
teacher = 'out/teacher_cifar100/student.safetensors'
# made by: python distill_classifier.py config/teacher_cifar10.py --data=cifar100 --out_dir=out/teacher_cifar100
student = 'resnet18'
width = 0
lam_kl = 1.0
temperature = 30.0
lam_msarc = 1.0
augment_crop = 4
augment_flip = True
epochs = 240
warmup_epochs = 20
batch_size = 256
lr = 0.1
weight_decay = 1e-4
out_dir = 'out/cifar100'
