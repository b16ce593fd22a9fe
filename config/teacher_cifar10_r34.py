# The CIFAR-10 ResNet-34 of Table I: python distill_classifier.py config/teacher_cifar10_r34.py
# Table I has 95.70 % on the test images, of a checkpoint that others published.
# The students' row, trained on data alone, is the same command with
#   --student=resnet18 --out_dir=out/student_cifar10_resnet18    (95.20 %)
#   --student=wrn16_1 --out_dir=out/student_cifar10_wrn16_1    (91.12 %)
#   --student=wrn16_2 --out_dir=out/student_cifar10_wrn16_2    (93.94 %)
#   --student=wrn40_1 --out_dir=out/student_cifar10_wrn40_1    (93.95 %)
method = 'data'
data = 'cifar10'
holdout = 0
student = 'resnet34'
width = 0
augment_crop = 4
augment_flip = True
epochs = 200
batch_size = 128
lr = 0.1
weight_decay = 5e-4
out_dir = 'out/teacher_cifar10_r34'
