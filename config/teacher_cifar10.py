# The teachers and the students' baselines of Table I on CIFAR-10 and CIFAR-100. The percentages are
# the paper's, on the test images; its teachers are checkpoints that others have published.
# ResNet-34, VGG-11 and WRN-40-2 (95.70, 92.25 and 94.87 %):
# python distill_classifier.py config/teacher_cifar10.py
# python distill_classifier.py config/teacher_cifar10.py --student=vgg11 --out_dir=out/teacher_cifar10_vgg11
# python distill_classifier.py config/teacher_cifar10.py --student=wrn40_2 --out_dir=out/teacher_cifar10_wrn40_2
# CIFAR-100, ResNet-34 and VGG-11 (78.05 and 71.32 %):
# python distill_classifier.py config/teacher_cifar10.py --data=cifar100 --out_dir=out/teacher_cifar100
# python distill_classifier.py config/teacher_cifar10.py --data=cifar100 --student=vgg11 --out_dir=out/teacher_cifar100_vgg11
# Students that are trained on the data alone: ResNet-18 (95.20 %), WRN-16-1 (91.12 %), WRN-16-2
# (93.94 %), WRN-40-1 (93.95 %), and ResNet-18 on CIFAR-100 (77.10 %):
# python distill_classifier.py config/teacher_cifar10.py --student=resnet18 --out_dir=out/student_cifar10_resnet18
# python distill_classifier.py config/teacher_cifar10.py --student=wrn16_1 --out_dir=out/student_cifar10_wrn16_1
# python distill_classifier.py config/teacher_cifar10.py --student=wrn16_2 --out_dir=out/student_cifar10_wrn16_2
# python distill_classifier.py config/teacher_cifar10.py --student=wrn40_1 --out_dir=out/student_cifar10_wrn40_1
# python distill_classifier.py config/teacher_cifar10.py --data=cifar100 --student=resnet18 --out_dir=out/student_cifar100_resnet18
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
out_dir = 'out/teacher_cifar10'
