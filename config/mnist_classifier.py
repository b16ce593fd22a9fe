# The bundled MNIST classifier, pretrained/mnist_resnet.safetensors:
# python distill_classifier.py config/mnist_classifier.py
method = 'data'
data = 'mnist'
holdout = 0
student = 'resnet14'
width = 0
epochs = 12
out_dir = 'out/mnist_resnet'
