# Clipart of DomainNet, ResNet-34 to ResNet-18 (Table II), on the images of:
# python synthesize.py config/synth_domainnet_sd15.py
# Another domain: --teacher=out/teacher_domainnet_r34_sketch/student.safetensors --data=out/synth_domainnet_r34_sketch
# --test=domainnet/sketch_test.txt:0-9 --out_dir=out/domainnet_r34_r18_sketch
# From the paper: the losses. From the authors' option files: the temperature, SGD's lr and weight decay, the batch,
# 240 epochs of a cosine with warm-up, whose length is ours. The weights of the losses are SpaceshipNet's.
data = 'out/synth_domainnet_r34'
test = 'domainnet/clipart_test.txt:0-9'
image_size = 224
teacher = 'out/teacher_domainnet_r34/student.safetensors'
# made by: python distill_classifier.py config/teacher_domainnet_r34.py
student = 'torchvision:resnet18'
width = 0
lam_kl = 1.0
temperature = 30.0
lam_msarc = 1.0
augment_crop = 28
augment_flip = True
epochs = 240
warmup_epochs = 20
batch_size = 256
lr = 0.1
weight_decay = 1e-4
out_dir = 'out/domainnet_r34_r18'
