"""
A student by the string that names it: a network of ours with random weights, one of a user's Python
file, one of diffusers by its config.json, or one that begins as its teacher
(adapters/from_teacher.py). dkdm.py and few_steps.py call build_student().
"""
import inspect

import torch

import models as M

SIZES = {  # default sizes of the student; student_config overrides them
    'unet': dict(patch_size=2, model_channels=28, num_res_blocks=1, channel_mult=(1, 1),
                 attention_resolutions=(7,)),
    'dit': dict(patch_size=2, hidden_size=128, depth=6, num_heads=4)}


def build_denoiser(
    spec, image_size, in_channels, num_classes, learn_sigma=True, config={}, teacher=None
):
    """A denoiser with random weights: a name in M.DENOISERS with `config` as its sizes; a Python
    file, whose build(image_size, in_channels, num_classes, **config) is called; or the config.json
    of a diffusers network, which shares the teacher's embedded texts. Raises UserError if it does
    not fit the images or the condition."""
    size = dict(image_size=image_size, in_channels=in_channels, num_classes=num_classes)
    if spec in M.DENOISERS:
        takes = inspect.signature(M.DENOISERS[spec]).parameters.keys()
        sizes = takes - size.keys() - {'out_channels', 'learn_sigma'}
        if odd := config.keys() - sizes:
            raise M.UserError(
                f"student_config: {spec} has no {min(odd)!r}; it has {', '.join(sorted(sizes))}"
            )
        if 'out_channels' in takes:
            size['out_channels'] = in_channels * (2 if learn_sigma else 1)
        elif 'learn_sigma' in takes:
            size['learn_sigma'] = learn_sigma
        kw = SIZES.get(spec, {}) | config | size
        net = M.DENOISERS[spec](**kw)
        if 'class' not in getattr(net, 'config', {}):
            net.config = kw | {'class': type(net).__name__}
        return net
    if spec.endswith('.py'):
        net = M.build_from_file(spec, **config | size)
    elif spec.endswith('.json'):
        net = M.adapter('hub').build_student(M.existing(spec), config, num_classes, teacher)
    else:
        raise M.UserError(
            f"student={spec!r}: {', '.join(map(repr, M.DENOISERS))}, 'teacher', a Python file with "
            'build(), or the config.json of a network of diffusers'
        )
    for key, value in size.items():
        if getattr(net, key) != value:
            raise M.UserError(f'{spec}: its {key} is {getattr(net, key)}, it should be {value}')
    return net


def output_channels(net, device):
    """The number of channels that a user's or a diffusers network predicts. Raises UserError if it
    is neither C nor 2C."""
    C, H = net.in_channels, net.image_size
    t = torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad():
        out = net.eval()(torch.zeros(1, C, H, H, device=device), t, t if net.num_classes else None)
    M.check(
        out.shape in ((1, C, H, H), (1, 2 * C, H, H)),
        f'the student turns {(C, H, H)} into {tuple(out.shape[1:])}; it must return the same '
        'number of channels, or twice as many'
    )
    return out.shape[1]


def build_student(
    spec, config, prediction, image_shape, num_classes, process, teacher, device, init_from=''
):
    """(net, diffusion): a student on the device and its process.

    spec, config: see `build_denoiser`; 'teacher' is a copy of the teacher's network. config's entry
    'learn_sigma' says whether it predicts its variance (the default), and 'lora_rank' trains
    adapters of a copy, which predicts what the teacher predicts. prediction: 'eps', 'v', 'x0',
    'flow' or 'teacher'. process: the arguments of the teacher's `Diffusion`. teacher: (its spec,
    its config, its network) or None. init_from='teacher' copies what fits. Raises UserError.
    """
    C, H = image_shape[:2]
    config = dict(config)
    learn_sigma = config.pop('learn_sigma', True)
    if prediction == 'teacher' or config.get('lora_rank'):
        prediction = process.get('prediction', 'v')
    M.check(teacher or 'teacher' not in (spec, init_from), 'there is no teacher to begin as')
    if spec == 'teacher':
        net = M.adapter('from_teacher').begin(*teacher, config, prediction, learn_sigma)
    else:
        M.check(not config.pop('lora_rank', 0), 'lora_rank needs --student=teacher')
        net = build_denoiser(
            spec, H, C, num_classes, learn_sigma, config, teacher[2] if teacher else None
        )
    net = net.to(device, memory_format=M.memory_format(device))
    diffusion = M.Diffusion(**process | dict(prediction=prediction, learn_sigma=learn_sigma))
    M.paired(net, diffusion)
    if spec not in M.DENOISERS:
        learn_sigma = output_channels(net, device) == 2 * C
        diffusion = M.Diffusion(**process | dict(prediction=prediction, learn_sigma=learn_sigma))
    if init_from == 'teacher' and spec != 'teacher':
        M.adapter('from_teacher').lend(teacher[2], process['prediction'], net, diffusion)
    return net, diffusion


@torch.no_grad()
def warn_if_y_is_ignored(net, name, diffusion, device, autocast):
    """Prints a warning if the network has classes, but gives the same output for two of them."""
    if net.num_classes < 2:
        return
    noise = torch.Generator(device).manual_seed(0)
    x_t = M.random_normal((1, net.in_channels, net.image_size, net.image_size), noise, device)
    t = torch.full((2,), diffusion.T // 2, device=device)
    y = torch.tensor([0, net.num_classes - 1], device=device)
    with autocast:
        first, last = net(x_t.expand(2, -1, -1, -1), t, y).float()
    if torch.allclose(first, last, rtol=1e-5, atol=1e-6):
        print(f'WARNING: {name} gives the same output for all {net.num_classes} classes; does its '
              'forward use y?')
