# Clipart of DomainNet, ResNet-34 to ResNet-18 (Table II). The images and the student:
# python synthesize.py config/synth_sd15.py --teacher=out/teacher_domainnet/student.safetensors --num_images=12000 --out_dir=out/synth_domainnet
# python distill_classifier.py config/distill_domainnet.py
# Another domain, here Sketch, whose images config/synth_sd15.py has the command for:
# python distill_classifier.py config/distill_domainnet.py --teacher=out/teacher_domainnet_sketch/student.safetensors --data=out/synth_domainnet_sketch --test=domainnet/sketch_test.txt:0-9 --out_dir=out/domainnet_sketch
# The losses are the paper's. The temperature, SGD's learning rate and weight decay, the batch size
# and 240 epochs of a cosine with warm-up are those of the authors' option files. The length of the
# warm-up is ours, and the weights of the losses are SpaceshipNet's.
data = 'out/synth_domainnet'
test = 'domainnet/clipart_test.txt:0-9'
image_size = 224
teacher = 'out/teacher_domainnet/student.safetensors'
# made by: python distill_classifier.py config/teacher_domainnet.py
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
out_dir = 'out/domainnet'
