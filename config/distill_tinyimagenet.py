# Tiny-ImageNet, ResNet-34 to ResNet-18 (Table I). The images and the student:
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_tinyimagenet/student.safetensors --num_images=30000 --out_dir=out/synth_tinyimagenet
# python distill_classifier.py config/distill_tinyimagenet.py
# The losses are the paper's. The temperature, SGD's learning rate and weight decay, the batch size
# and 240 epochs of a cosine with warm-up are those of the authors' option files. The length of the
# warm-up is ours, and the weights of the losses are SpaceshipNet's.
data = 'out/synth_tinyimagenet'
test = 'tiny-imagenet-200/val'
teacher = 'out/teacher_tinyimagenet/student.safetensors'
# made by: python distill_classifier.py config/teacher_tinyimagenet.py
student = 'resnet18'
width = 0
lam_kl = 1.0
temperature = 30.0
lam_msarc = 1.0
augment_crop = 8
augment_flip = True
epochs = 240
warmup_epochs = 20
batch_size = 256
lr = 0.1
weight_decay = 1e-4
out_dir = 'out/tinyimagenet'
