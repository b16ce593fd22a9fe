# The CIFAR-100 ResNet-34 of Table I: python distill_classifier.py config/teacher_cifar100_r34.py
# Table I has 78.05 % on the test images, of a checkpoint that others published.
# The students' row, trained on data alone, is the same command with
#   --student=resnet18 --out_dir=out/student_cifar100_resnet18    (77.10 %)
method = 'data'
data = 'cifar100'
holdout = 0
student = 'resnet34'
width = 0
augment_crop = 4
augment_flip = True
epochs = 200
batch_size = 128
lr = 0.1
weight_decay = 5e-4
out_dir = 'out/teacher_cifar100_r34'
